import assert from 'node:assert/strict';
import { parseResponseCode, Rc, TpmError } from 'tpm2-ts-bindings';

describe('tpm2-ts-bindings: response codes', () => {
  const table: readonly [number, number, string, string | undefined, number][] = [
    [0x000, Rc.SUCCESS, 'TPM_RC_SUCCESS', undefined, 0],
    [0x100, Rc.INITIALIZE, 'TPM_RC_INITIALIZE', undefined, 0],
    [0x101, Rc.FAILURE, 'TPM_RC_FAILURE', undefined, 0],
    [0x128, Rc.PCR_CHANGED, 'TPM_RC_PCR_CHANGED', undefined, 0],
    [0x14c, Rc.NV_DEFINED, 'TPM_RC_NV_DEFINED', undefined, 0],
    [0x18b, Rc.HANDLE, 'TPM_RC_HANDLE', 'handle', 1],
    [0x28b, Rc.HANDLE, 'TPM_RC_HANDLE', 'handle', 2],
    [0x98e, Rc.AUTH_FAIL, 'TPM_RC_AUTH_FAIL', 'session', 1],
    [0xa8e, Rc.AUTH_FAIL, 'TPM_RC_AUTH_FAIL', 'session', 2],
    [0x99d, Rc.POLICY_FAIL, 'TPM_RC_POLICY_FAIL', 'session', 1],
    [0x1c4, Rc.VALUE, 'TPM_RC_VALUE', 'parameter', 1],
    [0x2d5, Rc.SIZE, 'TPM_RC_SIZE', 'parameter', 2],
    [0xfc4, Rc.VALUE, 'TPM_RC_VALUE', 'parameter', 15],
    [0x902, Rc.OBJECT_MEMORY, 'TPM_RC_OBJECT_MEMORY', undefined, 0],
    [0x921, Rc.LOCKOUT, 'TPM_RC_LOCKOUT', undefined, 0],
    [0x922, Rc.RETRY, 'TPM_RC_RETRY', undefined, 0],
    // As the kernel's resource manager marks what it says itself.
    [0xb0143, Rc.COMMAND_CODE, 'TPM_RC_COMMAND_CODE', undefined, 0],
  ];

  it('split into canonical code, subject and index', () => {
    for (const [rc, canonical, name, subject, index] of table) {
      const parsed = parseResponseCode(rc);
      assert.deepEqual(
        [parsed.canonical, parsed.name, parsed.subject, parsed.index],
        [canonical, name, subject, index],
        `0x${rc.toString(16)}`,
      );
    }
  });

  it('only RETRY, YIELDED, TESTING and NV_RATE are retryable; a warning is not yet that', () => {
    const retryable = Array.from({ length: 0x1000 }, (_, rc) => rc).filter(
      (rc) => parseResponseCode(rc).retryable,
    );
    assert.deepEqual(retryable, [0x908, 0x90a, 0x920, 0x922]);
    assert.equal(parseResponseCode(0x921).warning, true);
    assert.equal(parseResponseCode(0x98e).warning, false);
  });

  it('is() ignores what the code is about and knows only answers of the TPM', () => {
    const error = TpmError.fromResponse('Unseal', 0x99d);
    assert.equal(TpmError.is(error, Rc.POLICY_FAIL), true);
    assert.equal(TpmError.is(error, Rc.AUTH_FAIL, Rc.VALUE), false);
    assert.equal(TpmError.is(new TpmError('transport', 'gone'), Rc.POLICY_FAIL), false);
  });

  it('the message names command, code and what it is about, in the words of the specification', () => {
    const message = (rc: number) => TpmError.fromResponse('Unseal', rc).message;
    assert.equal(message(0x99d), 'TPM2_Unseal: TPM_RC_POLICY_FAIL (session 1): a policy check failed');
    assert.equal(message(0x22), 'TPM2_Unseal: TPM_RC 0x22');
    assert.equal(message(0x9d), 'TPM2_Unseal: TPM_RC_POLICY_FAIL: a policy check failed');
    assert.equal(message(0x922), 'TPM2_Unseal: TPM_RC_RETRY: the TPM was not able to start the command');
  });

  it('an unknown code keeps its number', () => {
    assert.match(parseResponseCode(0x1fe).name, /0x1fe/);
  });
});
