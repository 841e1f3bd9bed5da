import type { AllowedImage } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type AdminContext, type AdminRequest, type Answer, ok, type Route, time } from './route.js';

const DIGEST = /^[0-9a-f]{64}$/;

export const imageRoutes: readonly Route[] = [
  {
    method: 'GET',
    path: '/images',
    handle: (_, { service }) => ok({ images: service().trust.images().map(describeImage) }),
  },
  { method: 'POST', path: '/images', audits: 'image-allow', handle: allowImage },
  { method: 'DELETE', path: '/images/{digest}', audits: 'image-remove', handle: removeImage },
];

async function allowImage(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { trust, audit } = service();
  const body = await request.body();
  const bytes = digestOf(body.digest);
  const { note } = body;
  if (note !== undefined && typeof note !== 'string') throw new ManagerError('bad-request', '"note" is text');
  const facts = { digest: bytes.toString('hex'), ...(note !== undefined && { note }) };
  const event = { actor: request.actor, action: 'image-allow', facts } as const;
  await audit.append({ ...event, verdict: 'intended' });
  const image = await trust.allowImage(bytes, note, BigInt(Date.now()));
  await audit.append({ ...event, verdict: 'done' });
  return { status: 201, body: describeImage(image) };
}

async function removeImage(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { trust, audit } = service();
  const bytes = digestOf(request.param('digest'));
  const digest = bytes.toString('hex');
  const event = { actor: request.actor, action: 'image-remove', facts: { digest } } as const;
  await audit.append({ ...event, verdict: 'intended' });
  if (!(await trust.removeImage(bytes))) {
    throw new ManagerError('unknown-image', `image ${digest} is not on the list; see it: vtpmctl image list`);
  }
  await audit.append({ ...event, verdict: 'done' });
  return ok({ digest });
}

function describeImage(image: AllowedImage) {
  return {
    digest: Buffer.from(image.digest).toString('hex'),
    note: image.note,
    allowedAt: time(image.allowedAt),
  };
}

/** @throws ManagerError `bad-request` */
function digestOf(value: unknown): Buffer {
  if (typeof value !== 'string' || !DIGEST.test(value)) {
    throw new ManagerError('bad-request', 'an image digest is 64 hex digits, in lower case');
  }
  return Buffer.from(value, 'hex');
}
