import type { ToolstackErrorCode } from '../error.js';

const STEPS: Partial<Record<ToolstackErrorCode, string>> = {
  'not-initialised': 'vtpmctl init makes an installation',
  'unknown-vtpm': 'vtpmctl list shows what there is',
  'name-taken': 'vtpmctl list shows the names in use',
  'not-stopped': 'stop it first: vtpmctl stop NAME',
  'already-running': 'vtpmctl show NAME shows its sockets',
  busy: 'try again in a moment',
  'image-not-allowed': 'vtpmctl image allow allows the image that the supervisor runs',
  'worker-failed': 'vtpmctl logs NAME shows what the worker said',
  'worker-late': 'vtpmctl logs NAME shows what the worker said',
  'manager-unreachable':
    'vtpmctl up starts the manager where it does not run; vtpmctl logs shows what it says',
  locked:
    'bring the platform back to the state it was enrolled in and restart: vtpmctl down, then vtpmctl up',
  internal: 'vtpmctl logs shows more',
};

/**
 * A daemon's message, with what to type next where the message does not say so itself.
 * @param name of the vTPM it is about, where it is about one
 */
export function nextStep(code: ToolstackErrorCode, message: string, name = 'NAME'): string {
  const step = STEPS[code];
  return step === undefined || message.includes('vtpmctl')
    ? message
    : `${message}; ${step.replace('NAME', name)}`;
}
