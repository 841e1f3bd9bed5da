import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { connect as connectHttp2 } from 'node:http2';
import { connect } from 'node:net';
import { bootId, monotonicMs, type Paths } from 'vtpm-common';
import {
  boxKeyPair,
  encode,
  frameMessage,
  LOAD_PATH,
  sealBox,
  signingKeyFromSeed,
  signTicket,
  ticketDigest,
  uuidToBytes,
} from 'vtpm-proto';

export interface ForeignTicket {
  /** The vTPM whose delegation the attacker has. */
  readonly has: { id: string; vmUuid: string };
  /** The vTPM it wants. */
  readonly wants: { id: string; vmUuid: string };
  readonly managerId: string;
  readonly imageDigest: string;
  readonly epoch: number;
}

interface ListedVtpm {
  id: string;
  delegation: string;
  delegationSignature: string;
}

/**
 * Plays a thief who holds everything that belongs to one vTPM, the supervisor's own signing key included, and asks the
 * manager for another one with it. @returns the manager's reason, undefined where the thief got in
 */
export async function loadWithForeignTicket(paths: Paths, theft: ForeignTicket): Promise<string | undefined> {
  const list = JSON.parse(readFileSync(paths.supervisor.vtpms, 'utf8')) as { vtpms: ListedVtpm[] };
  const own = list.vtpms.find((vtpm) => vtpm.id === theft.has.id);
  if (!own) throw new Error('the supervisor does not list the first vTPM');
  const delegateKey = signingKeyFromSeed(readFileSync(paths.supervisor.delegateKey));
  const worker = boxKeyPair();
  const managerId = Buffer.from(theft.managerId, 'hex');
  const ticket = signTicket(
    delegateKey,
    {
      format: 1,
      managerId,
      vtpmUuid: uuidToBytes(theft.wants.id),
      vmUuid: uuidToBytes(theft.wants.vmUuid),
      vmRunId: randomBytes(16),
      workerPublicKey: worker.publicKey,
      imageDigest: Buffer.from(theft.imageDigest, 'hex'),
      isolation: 'sandbox',
      expectedEpoch: BigInt(theft.epoch),
      verbs: ['COLD'],
      bootId: bootId(),
      expiresAtMonotonicMs: monotonicMs() + 60_000n,
    },
    {
      delegation: Buffer.from(own.delegation, 'base64'),
      signature: Buffer.from(own.delegationSignature, 'base64'),
    },
  );
  const claim = { ticketDigest: ticketDigest(ticket), loadId: randomBytes(16), libtpmsVersion: '0.9.2' };
  return load(
    paths.manager.workerSocket,
    encode('LoadRequest', { ticket, ...sealBox('LoadClaim', claim, managerId, worker) }),
  );
}

/** One Load call, gRPC over HTTP/2 by hand. */
function load(socketPath: string, request: Uint8Array): Promise<string | undefined> {
  const session = connectHttp2('http://localhost', { createConnection: () => connect(socketPath) });
  return new Promise<string | undefined>((resolve, reject) => {
    session.on('error', reject);
    const call = session.request({
      ':method': 'POST',
      ':path': LOAD_PATH,
      'content-type': 'application/grpc+proto',
      te: 'trailers',
    });
    let reason: string | undefined;
    const look = (headers: object) => {
      const given = (headers as Record<string, string | undefined>)['vtpm-reason'];
      if (given) reason = given;
    };
    call.on('response', look);
    call.on('trailers', look);
    call.on('error', reject);
    call.on('close', () => resolve(reason));
    call.resume();
    call.end(frameMessage(request));
  }).finally(() => session.close());
}
