import {
  type AdminContext,
  type AdminRequest,
  type Answer,
  consentOf,
  ok,
  plainOf,
  type Route,
} from '../admin/route.js';
import { MAX_FRAME_BYTES } from '../backup/format.js';
import { wipe } from '../keys/index.js';

export const rescueRoutes: readonly Route[] = [
  { method: 'POST', path: '/rescue', audits: 'rescue', handle: rescue },
];

/** A vTPM of a host that is dead; only says what it would do without `?accept-rollback=yes`. */
async function rescue(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const control = service().rescues;
  const isAccepted = consentOf(request.query);
  const body = await request.bytes(MAX_FRAME_BYTES);
  try {
    const plan = isAccepted ? await control.rescue(request.actor, body) : await control.plan(body);
    return ok({ isDone: isAccepted, ...plainOf(plan) });
  } finally {
    // The state in the clear, of which every other view is a part.
    wipe(body);
  }
}
