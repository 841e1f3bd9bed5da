import assert from 'node:assert/strict';
import type { VtpmdError, VtpmdErrorCode } from 'vtpmd/error';

/**
 * For assert.throws and assert.rejects: one of these refusals, by its name. Where a process of mocha has run many files, the
 * class of the error is not always the one that a test imports.
 */
export const refused =
  (...codes: VtpmdErrorCode[]) =>
  (error: unknown): boolean => {
    const { name, code, message } = error as VtpmdError;
    assert.equal(name, 'VtpmdError', String(error));
    assert.ok(codes.includes(code), `${code}: ${message}`);
    return true;
  };
