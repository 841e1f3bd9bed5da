import { once } from 'node:events';
import { Agent, type IncomingMessage, request } from 'node:http';
import { ManagerError, type ManagerErrorCode } from '../error.js';

/** The manager's admin plane, from another process of the same program. */
export class AdminClient {
  readonly #agent: Agent;

  /** @param connections at most at a time */
  constructor(
    private readonly socketPath: string,
    connections = 1,
  ) {
    this.#agent = new Agent({ keepAlive: true, maxSockets: connections });
  }

  async json(method: string, path: string, body?: Uint8Array): Promise<Record<string, unknown>> {
    const response = await this.stream(method, path, body);
    return parse(await textOf(response));
  }

  /** @throws ManagerError of the manager, `locked` where it does not run */
  async stream(method: string, path: string, body?: Uint8Array): Promise<IncomingMessage> {
    const call = request({ socketPath: this.socketPath, method, path, agent: this.#agent });
    call.end(body);
    let response: IncomingMessage;
    try {
      [response] = (await once(call, 'response')) as [IncomingMessage];
    } catch (cause) {
      throw new ManagerError(
        'locked',
        `the manager does not answer (${(cause as Error).message}); start it: vtpmctl up`,
        { cause },
      );
    }
    if (response.statusCode === 200) return response;
    const { error } = parse(await textOf(response)) as { error?: { code?: unknown; message?: unknown } };
    throw new ManagerError((error?.code ?? 'internal') as ManagerErrorCode, String(error?.message));
  }

  close(): void {
    this.#agent.destroy();
  }
}

async function textOf(response: IncomingMessage): Promise<string> {
  let text = '';
  for await (const chunk of response.setEncoding('utf8')) text += chunk;
  return text;
}

function parse(text: string): Record<string, unknown> {
  try {
    return JSON.parse(text) as Record<string, unknown>;
  } catch (cause) {
    throw new ManagerError('internal', 'the manager answered with something else than JSON', { cause });
  }
}
