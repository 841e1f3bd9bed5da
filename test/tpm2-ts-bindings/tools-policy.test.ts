import assert from 'node:assert/strict';
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import {
  Alg,
  approvalMessage,
  commandHash,
  Duplicate,
  Eo,
  encode,
  hashInfo,
  type NvEntity,
  nameHash,
  nameOf,
  type ObjectEntity,
  PCR_Extend,
  type PolicyStep,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  Rh,
  readNvIndex,
  readPcrs,
  signedPolicyMessage,
  signInSoftware,
  softwareKeyPublic,
  tpm2b,
  Unseal,
  withPassword,
} from 'tpm2-ts-bindings';
import { NOTHING } from '../support/tpm-fixture.js';
import { type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { publicFile, signatureFile } from '../support/tpm2-tools-files.js';
import { OWNER } from './make.js';

const SIGNER = generateKeyPairSync('ec', { namedCurve: 'P-256' });
const SIGNER_PUBLIC = softwareKeyPublic(SIGNER.publicKey, { use: 'sign' });
const SIGNER_NAME = nameOf(SIGNER_PUBLIC.value.nameAlg, SIGNER_PUBLIC.bytes);
const SELECTION = parsePcrSelection('sha256:16,23');
const INDEX = 0x01500020;
const REF = Buffer.from('00c0ffee00', 'hex');
const OPERAND = Buffer.from('0102030405060708', 'hex');
const OBJECT_NAME = nameOf(Alg.SHA256, randomBytes(60));
const PARENT_NAME = nameOf(Alg.SHA256, randomBytes(60));
const unlimited = { cpHash: NOTHING, expiration: 0 };

function u64(value: bigint): Buffer {
  const out = Buffer.alloc(8);
  out.writeBigUInt64BE(value);
  return out;
}

const u32 = (value: number): Buffer => u64(BigInt(value)).subarray(4);

describe('tpm2-ts-bindings and tpm2-tools: policies', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  let values: Buffer[];
  let index: NvEntity;
  let secret: ObjectEntity;
  before(async () => {
    await tools.run(`tpm2_nvdefine -Q ${INDEX} -C o -s 8 -a ownerread|ownerwrite|authread|authwrite`);
    tools.write('operand', OPERAND);
    await tools.run(`tpm2_nvwrite -Q ${INDEX} -C o -i operand`);
    await tools.run('tpm2_createprimary -Q -C o -G ecc -p opensesame -c secret.ctx');
    tools.writeAs('signer.pub', publicFile, SIGNER_PUBLIC);
    await tools.run('tpm2_loadexternal -Q -C o -u signer.pub -c signer.ctx -n signer.name');
    assert.deepEqual(tools.bytes('signer.name'), SIGNER_NAME);
    tools.write('object.name', OBJECT_NAME);
    tools.write('parent.name', PARENT_NAME);
    await tools.direct(async (tpm) => {
      await tpm.run(
        PCR_Extend,
        { pcrHandle: withPassword(permanent(16)) },
        { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] },
      );
      values = await readPcrs(tpm, SELECTION);
      const found = await readNvIndex(tpm, INDEX);
      assert.ok(found);
      index = found;
      secret = await tools.withContext(tpm, 'secret.ctx', async (object) => object);
    });
  });

  /** One policy, as steps of ours and as command lines without session and file. */
  interface Same {
    readonly steps: readonly PolicyStep[];
    readonly lines: readonly string[];
  }
  /** The hash of the policy, and how many bytes it has. */
  interface Hash {
    readonly alg: number;
    readonly name: string;
    readonly size: number;
  }

  const pcr = ({ alg }: Hash): PolicyStep => ({
    assert: 'pcr',
    selection: SELECTION,
    digest: pcrDigest(alg, values),
  });
  const command = (code: number): PolicyStep => ({ assert: 'command-code', code });
  const signed: PolicyStep = {
    assert: 'signed',
    signer: SIGNER_PUBLIC,
    policyRef: REF,
    sign: () => assert.fail('only a TPM asks for a signature'),
  };
  const authorize: PolicyStep = { assert: 'authorize', signer: SIGNER_PUBLIC, policyRef: REF };
  const nv = (operation: number, offset = 0): PolicyStep => ({
    assert: 'nv',
    index,
    by: withPassword(OWNER),
    operand: OPERAND.subarray(offset),
    offset,
    operation,
  });
  const timer = (operand: Buffer, offset: number, operation: number): PolicyStep => ({
    assert: 'counter-timer',
    operand,
    offset,
    operation,
  });

  /** Puts what PolicySigned takes in files. @returns the command line */
  const signedLine = (): string => {
    const message = signedPolicyMessage({ ...unlimited, policyRef: REF }, NOTHING);
    tools.writeAs('signed.sig', signatureFile, signInSoftware(SIGNER.privateKey, message));
    return `tpm2_policysigned -c signer.ctx -g sha256 -s signed.sig -q ${REF.toString('hex')}`;
  };
  /** Puts what PolicyAuthorize takes in files. @returns the command lines */
  const authorizeLines = async (approved: Buffer): Promise<string[]> => {
    const message = approvalMessage(approved, REF);
    tools.write('approved', approved);
    tools.write('approved.msg', message);
    tools.writeAs('approved.sig', signatureFile, signInSoftware(SIGNER.privateKey, message));
    await tools.run(
      'tpm2_verifysignature -Q -c signer.ctx -g sha256 -m approved.msg -s approved.sig -t approved.ticket',
    );
    return [`tpm2_policyauthorize -i approved -q ${REF.toString('hex')} -n signer.name -t approved.ticket`];
  };
  const branchFiles = (hash: Hash, ...branches: Buffer[]): string => {
    for (const [at, branch] of branches.entries()) tools.write(`branch${at}`, branch);
    return `tpm2_policyor -l ${hash.name}:${branches.map((_, at) => `branch${at}`).join(',')}`;
  };

  const POLICIES: Record<string, (hash: Hash) => Same | Promise<Same>> = {
    PolicyPCR: (hash) => ({ steps: [pcr(hash)], lines: ['tpm2_policypcr -l sha256:16,23'] }),
    'PolicyPCR with values of a file': ({ alg }) => {
      const other = [randomBytes(20), ...values];
      tools.write('values', Buffer.concat(other));
      const selection = parsePcrSelection('sha1:3+sha256:16,23');
      return {
        steps: [{ assert: 'pcr', selection, digest: pcrDigest(alg, other) }],
        lines: ['tpm2_policypcr -l sha1:3+sha256:16,23 -f values'],
      };
    },
    PolicyAuthValue: () => ({ steps: [{ assert: 'auth-value' }], lines: ['tpm2_policyauthvalue'] }),
    PolicyPassword: () => ({ steps: [{ assert: 'password' }], lines: ['tpm2_policypassword'] }),
    PolicyCommandCode: () => ({
      steps: [command(Duplicate.code)],
      lines: ['tpm2_policycommandcode TPM2_CC_Duplicate'],
    }),
    'PolicySecret of a hierarchy': () => ({
      steps: [{ assert: 'secret', of: withPassword(permanent(Rh.ENDORSEMENT)) }],
      lines: ['tpm2_policysecret -c e'],
    }),
    'PolicySecret of an object, with a reference': () => ({
      steps: [{ assert: 'secret', of: withPassword(secret), policyRef: REF }],
      lines: [`tpm2_policysecret -c secret.ctx -q ${REF.toString('hex')} opensesame`],
    }),
    PolicySigned: () => ({ steps: [signed], lines: [signedLine()] }),
    PolicyAuthorize: async (hash) => ({
      steps: [authorize],
      lines: await authorizeLines(policyDigest([], hash.alg)),
    }),
    'PolicyAuthorize forgets what came before': async (hash) => {
      const before = [command(Unseal.code)];
      return {
        steps: [...before, authorize, { assert: 'auth-value' }],
        lines: [
          'tpm2_policycommandcode TPM2_CC_Unseal',
          ...(await authorizeLines(policyDigest(before, hash.alg))),
          'tpm2_policyauthvalue',
        ],
      };
    },
    PolicyOR: (hash) => {
      const branches = [[command(Unseal.code)], [pcr(hash)], randomBytes(hash.size)];
      const digests = branches.map((branch) =>
        branch instanceof Uint8Array ? branch : policyDigest(branch, hash.alg),
      );
      return {
        steps: [{ assert: 'or', branches }],
        lines: ['tpm2_policycommandcode TPM2_CC_Unseal', branchFiles(hash, ...digests)],
      };
    },
    'PolicyNV: the whole content': () => ({
      steps: [nv(Eo.EQ)],
      lines: [`tpm2_policynv -C o -i operand ${INDEX} eq`],
    }),
    'PolicyNV: a part, unsigned': () => {
      tools.write('rest', OPERAND.subarray(3));
      return {
        steps: [nv(Eo.UNSIGNED_GE, 3)],
        lines: [`tpm2_policynv -C o -i rest --offset 3 ${INDEX} uge`],
      };
    },
    'PolicyDuplicationSelect for any object': () => ({
      steps: [{ assert: 'duplication-select', newParentName: PARENT_NAME, includeObject: false }],
      lines: ['tpm2_policyduplicationselect -N parent.name'],
    }),
    'PolicyDuplicationSelect for one object': () => ({
      steps: [
        {
          assert: 'duplication-select',
          newParentName: PARENT_NAME,
          includeObject: true,
          objectName: OBJECT_NAME,
        },
      ],
      lines: ['tpm2_policyduplicationselect -N parent.name -n object.name --include-object'],
    }),
    'PolicyNvWritten: set': () => ({
      steps: [{ assert: 'nv-written', written: true }],
      lines: ['tpm2_policynvwritten s'],
    }),
    'PolicyNvWritten: clear': () => ({
      steps: [{ assert: 'nv-written', written: false }],
      lines: ['tpm2_policynvwritten c'],
    }),
    'PolicyLocality: 0 and 3': () => ({
      steps: [{ assert: 'locality', locality: 0b1001 }],
      lines: ['tpm2_policylocality 9'],
    }),
    'PolicyLocality: an extended one': () => ({
      steps: [{ assert: 'locality', locality: 77 }],
      lines: ['tpm2_policylocality 77'],
    }),
    PolicyCpHash: (hash) => {
      const cpHash = commandHash(Unseal, { itemHandle: secret }, {}, hash.alg);
      tools.write('hash', encode(tpm2b, cpHash));
      return { steps: [{ assert: 'cp-hash', cpHash }], lines: ['tpm2_policycphash --cphash-input hash'] };
    },
    PolicyNameHash: (hash) => {
      const ofBoth = nameHash([secret, index], hash.alg);
      tools.write('hash', ofBoth);
      return { steps: [{ assert: 'name-hash', nameHash: ofBoth }], lines: ['tpm2_policynamehash -n hash'] };
    },
    PolicyTemplate: (hash) => {
      const templateHash = randomBytes(hash.size);
      tools.write('hash', templateHash);
      return {
        steps: [{ assert: 'template', templateHash }],
        lines: ['tpm2_policytemplate --template-hash hash'],
      };
    },
    'PolicyCounterTimer: each field, one after the other': () => ({
      steps: [
        timer(u64(7n), 0, Eo.UNSIGNED_GE),
        timer(u64(0x1_0000_0000_00n), 8, Eo.UNSIGNED_LT),
        timer(u32(1), 16, Eo.EQ),
        timer(u32(9), 20, Eo.SIGNED_LE),
        timer(Buffer.of(1), 24, Eo.EQ),
      ],
      lines: [
        'tpm2_policycountertimer --uge time=7',
        `tpm2_policycountertimer --ult clock=${0x1_0000_0000_00}`,
        'tpm2_policycountertimer --eq resets=1',
        'tpm2_policycountertimer --sle restarts=9',
        'tpm2_policycountertimer safe',
      ],
    }),
    'a chain: PCR, authValue, command': (hash) => ({
      steps: [pcr(hash), { assert: 'auth-value' }, command(Unseal.code)],
      lines: [
        'tpm2_policypcr -l sha256:16,23',
        'tpm2_policyauthvalue',
        'tpm2_policycommandcode TPM2_CC_Unseal',
      ],
    }),
    'a chain: signature, secret, NV, locality': () => ({
      steps: [
        signed,
        { assert: 'secret', of: withPassword(OWNER) },
        nv(Eo.EQ),
        { assert: 'locality', locality: 1 },
      ],
      lines: [
        signedLine(),
        'tpm2_policysecret -c o',
        `tpm2_policynv -C o -i operand ${INDEX} eq`,
        'tpm2_policylocality zero',
      ],
    }),
    'a chain: a choice after PCRs, then an approved one, then a choice': async (hash) => {
      const first: PolicyStep[] = [pcr(hash)];
      const branches = [[command(Unseal.code)], [{ assert: 'nv-written', written: true } as const]];
      const chosen: PolicyStep[] = [...first, { assert: 'or', branches }];
      const last: PolicyStep[] = [{ assert: 'password' }];
      const other = randomBytes(hash.size);
      const inner = branches.map((branch) => policyDigest([...first, ...branch], hash.alg));
      const approved = await authorizeLines(policyDigest(chosen, hash.alg));
      const innerLine = branchFiles(hash, ...inner);
      tools.write('last0', policyDigest([...chosen, authorize, ...last], hash.alg));
      tools.write('last1', other);
      return {
        steps: [...chosen, authorize, { assert: 'or', branches: [last, other] }],
        lines: [
          'tpm2_policypcr -l sha256:16,23',
          'tpm2_policycommandcode TPM2_CC_Unseal',
          innerLine,
          ...approved,
          'tpm2_policypassword',
          `tpm2_policyor -l ${hash.name}:last0,last1`,
        ],
      };
    },
  };

  for (const alg of [Alg.SHA256, Alg.SHA384]) {
    const hash = hashInfo(alg)!;
    for (const [name, make] of Object.entries(POLICIES)) {
      it(`${name}, ${hash.name}: the digest here is that of a trial session of the tools`, async () => {
        const { steps, lines } = await make(hash);
        await tools.inSession(`-g ${hash.name}`, async () => {
          for (const line of lines)
            await tools.run(line.replace(/^\w+/, (tool) => `${tool} -Q -S session.ctx -L digest`));
        });
        assert.equal(policyDigest(steps, alg).toString('hex'), tools.bytes('digest').toString('hex'));
      });
    }
  }
});
