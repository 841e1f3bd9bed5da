import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { promisify } from 'node:util';
import {
  Alg,
  decode,
  flush,
  Load,
  type NvEntity,
  type ObjectEntity,
  objectEntity,
  PCR_Extend,
  permanent,
  readNvIndex,
  readObject,
  type Tpm,
  tpmtPublic,
  withPassword,
} from 'tpm2-ts-bindings';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager/error';
import {
  type EnrolOptions,
  openRootTpm,
  type RootTpm,
  type RootTpmEnrolment,
} from 'vtpm-manager/root-tpm/index';
import { isA } from '../support/is-a.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm } from '../support/tpm-fixture.js';

export const SRK = 0x81000001;
export const PCRS = 'sha256:0,7';
export const INSTALLATION = randomBytes(16);
export const ANCHOR_AUTH = randomBytes(32);
export const ENROL: EnrolOptions = {
  installation: INSTALLATION,
  anchorAuth: ANCHOR_AUTH,
  pcrSelection: PCRS,
  srkHandle: SRK,
};

export const refuses = (code: ManagerErrorCode, text?: RegExp) => (error: unknown) => {
  assert.ok(isA(error, ManagerError), String(error));
  assert.equal(error.code, code, error.message);
  if (text !== undefined) assert.match(error.message, text);
  return true;
};

/** A chip for each test, which at its end holds nothing that is loaded. */
export class Chip {
  swtpm!: Swtpm;

  constructor() {
    beforeEach(async () => {
      this.swtpm = await startSwtpm();
    });
    afterEach(async () => {
      const { exitCode, signalCode } = this.swtpm.process;
      if (exitCode === null && signalCode === null) await this.direct((tpm) => assertNothingLeaked(tpm));
      await this.swtpm.stop();
    });
  }

  /** One connection of the test's own: swtpm serves one client at a time. */
  async direct<T>(body: (tpm: Tpm) => Promise<T>): Promise<T> {
    const tpm = await connectTpm(this.swtpm.socket);
    try {
      return await body(tpm);
    } finally {
      await tpm.close();
    }
  }

  async root<T>(body: (root: RootTpm) => Promise<T>, path = this.swtpm.socket): Promise<T> {
    const opened = await openRootTpm({ kind: 'unix', path });
    try {
      return await body(opened);
    } finally {
      await opened.close();
    }
  }

  enrol(options: Partial<EnrolOptions> = {}) {
    return this.root((tpm) => tpm.enrol({ ...ENROL, ...options }));
  }

  /** With random bytes, as no boot ever does again. */
  extend(pcr: number, digest = randomBytes(32)): Promise<unknown> {
    return this.direct((tpm) =>
      tpm.run(
        PCR_Extend,
        { pcrHandle: withPassword(permanent(pcr)) },
        { digests: [{ hashAlg: Alg.SHA256, digest }] },
      ),
    );
  }

  /** Runs one of tpm2-tools. */
  async tools(cwd: string, program: string, ...args: string[]): Promise<void> {
    const TPM2TOOLS_TCTI = `swtpm:path=${this.swtpm.socket}`;
    await promisify(execFile)(program, args, {
      cwd,
      env: { ...process.env, TPM2TOOLS_TCTI, TSS2_LOG: 'all+ERROR' },
    });
  }
}

/** The enrolled NV half as it is in the TPM. */
export async function halfOf(tpm: Tpm, { root }: RootTpmEnrolment): Promise<NvEntity> {
  return (await readNvIndex(tpm, root.nvHandle))!;
}

export async function withLoaded<T>(
  tpm: Tpm,
  { root, srkHandle }: RootTpmEnrolment,
  body: (sealed: ObjectEntity) => Promise<T>,
): Promise<T> {
  const bytes = Buffer.from(root.sealedPublic, 'base64');
  const inPublic = { bytes, value: decode(tpmtPublic, bytes) };
  const srk = (await readObject(tpm, srkHandle))!;
  const { objectHandle } = await tpm.run(
    Load,
    { parentHandle: withPassword(srk) },
    { inPrivate: Buffer.from(root.sealedPrivate, 'base64'), inPublic },
  );
  try {
    return await body(objectEntity(objectHandle, inPublic));
  } finally {
    await flush(tpm, objectHandle);
  }
}
