import type { ServerResponse } from 'node:http';
import type { VtpmEvent, VtpmEvents } from '../ownership/events.js';

const HEARTBEAT_MS = 10_000;
/** A reader that lags this far is cut off: it asks again and lists anew. */
const MAX_BACKLOG_BYTES = 1024 * 1024;

/**
 * One JSON object a line until the caller hangs up, or the store is lost: who asks again then lists anew.
 * @param wanted types of events; undefined: all of them
 */
export function streamEvents(
  response: ServerResponse,
  events: VtpmEvents,
  instance: string,
  wanted: ReadonlySet<string> | undefined,
): void {
  response.writeHead(200, { 'content-type': 'application/x-ndjson' });
  const write = (value: object): void => {
    response.write(
      `${JSON.stringify(value, (_, item) => (typeof item === 'bigint' ? Number(item) : item))}\n`,
    );
    if (response.writableLength > MAX_BACKLOG_BYTES) response.destroy();
  };
  write({ type: 'hello', instance });
  const writeWanted = (event: VtpmEvent): void => {
    if (wanted?.has(event.type) !== false) write(event);
  };
  // Who does not want to hear of what comes takes nothing in.
  const begin = wanted?.has('incoming') === false ? 'subscribe' : 'follow';
  const unsubscribe = events[begin](writeWanted, () => response.end());
  const heartbeat = setInterval(() => write({ type: 'heartbeat' }), HEARTBEAT_MS);
  heartbeat.unref();
  response.once('close', () => {
    clearInterval(heartbeat);
    unsubscribe();
  });
}
