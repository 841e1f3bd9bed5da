import { backupRoutes } from '../backup/routes.js';
import { METRICS_TYPE, renderMetrics } from '../metrics.js';
import { rescueRoutes } from '../rescue/routes.js';
import { auditRoutes } from './audit-routes.js';
import { streamEvents } from './event-stream.js';
import { imageRoutes } from './image-routes.js';
import { migrationRoutes } from './migration-routes.js';
import { peerRoutes } from './peer-routes.js';
import { platformRoutes } from './platform-routes.js';
import { ok, onlyKnown, type Route } from './route.js';
import { vtpmRoutes } from './vtpm-routes.js';

/** Every call of the admin plane. docs/admin-api.yaml describes each, and a test holds one against the other. */
export const ROUTES: readonly Route[] = [
  { method: 'GET', path: '/health', handle: (_, { health }) => ok(health()) },
  { method: 'GET', path: '/doctor', handle: async (_, { doctor }) => ok({ findings: await doctor() }) },
  {
    method: 'GET',
    path: '/events',
    handle: ({ query }, { service, health }) => {
      onlyKnown(query, ['types']);
      const types = query.get('types');
      const wanted = types === null ? undefined : new Set(types.split(','));
      const { events } = service().registry;
      return (response) => streamEvents(response, events, health().instance, wanted);
    },
  },
  {
    method: 'GET',
    path: '/metrics',
    handle: async (_, { metrics }) => {
      const text = await renderMetrics(metrics());
      return (response) => {
        response.writeHead(200, { 'content-type': METRICS_TYPE });
        response.end(text);
      };
    },
  },
  ...vtpmRoutes,
  ...imageRoutes,
  ...migrationRoutes,
  ...peerRoutes,
  ...platformRoutes,
  ...auditRoutes,
  ...backupRoutes,
  ...rescueRoutes,
];
