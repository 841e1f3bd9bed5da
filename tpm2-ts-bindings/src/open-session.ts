import { concat, wipe } from './bytes.js';
import { flush } from './client.js';
import { StartAuthSession } from './commands/index.js';
import { Alg, Ht, Rh, Se } from './constants.js';
import { encapsulate, kdfa, random, requireHash } from './crypto.js';
import { permanent } from './entity.js';
import { TpmError } from './error.js';
import { Session, type SessionOptions } from './session.js';
import type { Tpm } from './tpm.js';

const SESSION_TYPE = { hmac: Se.HMAC, policy: Se.POLICY, trial: Se.TRIAL } as const;
const NOTHING = Buffer.alloc(0);

/** Opens a session. Close it: a TPM without a resource manager has three or so. */
export async function openSession(tpm: Tpm, options: SessionOptions): Promise<Session> {
  const { salt, bind } = options;
  // The type cannot say it of an empty authValue: binding to that adds nothing either.
  if (options.encrypt !== undefined && salt === undefined && !bind?.authValue.length) {
    throw new TpmError('usage', 'a session that encrypts needs a salt, or a bind entity with an authValue');
  }
  // Nobody could say later whether an entity is the one it is bound to, so whether its authValue enters.
  if (bind !== undefined && bind.name === undefined) {
    throw new TpmError(
      'usage',
      'a session cannot be bound to a handle without its Name; read the entity first',
    );
  }
  const hash = requireHash(options.authHash ?? Alg.SHA256);
  const nonceCaller = random(hash.size);
  const salted = salt === undefined ? undefined : encapsulate(salt.publicArea.value, 'SECRET');
  const seed = concat(bind?.authValue ?? NOTHING, salted?.secret ?? NOTHING);
  try {
    const started = await tpm.run(
      StartAuthSession,
      { tpmKey: salt ?? permanent(Rh.NULL), bind: bind ?? permanent(Rh.NULL) },
      {
        nonceCaller,
        encryptedSalt: salted?.encrypted ?? NOTHING,
        sessionType: SESSION_TYPE[options.kind],
        symmetric:
          options.encrypt === undefined
            ? { algorithm: Alg.NULL }
            : { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB },
        authHash: hash.alg,
      },
    );
    const type = options.kind === 'hmac' ? Ht.HMAC_SESSION : Ht.POLICY_SESSION;
    if (started.sessionHandle >>> 24 !== type || started.nonceTPM.length !== nonceCaller.length) {
      await flush(tpm, started.sessionHandle);
      throw new TpmError('malformed', 'answer to TPM2_StartAuthSession: no session of the kind asked for');
    }
    // Part 1, "Session-Based Authorizations": no key where there is neither salt nor bind.
    const key =
      salt === undefined && bind === undefined
        ? NOTHING
        : kdfa(hash, seed, 'ATH', started.nonceTPM, nonceCaller, hash.size * 8);
    return new Session(tpm, started.sessionHandle, hash, key, options, nonceCaller, started.nonceTPM);
  } finally {
    wipe(seed, salted?.secret);
  }
}

/** Runs `body` with a session that is closed afterwards, whatever happens. */
export async function inSession<T>(
  tpm: Tpm,
  options: SessionOptions,
  body: (session: Session) => Promise<T>,
): Promise<T> {
  const session = await openSession(tpm, options);
  try {
    return await body(session);
  } finally {
    await session.close();
  }
}
