import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';

/** The only way to a listener, a port beside its own: it can be cut as a link can, and nobody is told. */
export class Line {
  readonly #servers: Server[] = [];
  /** Both ends of each connection. */
  readonly #pairs = new Set<readonly [Socket, Socket]>();
  #isCut = false;
  #port = 0;

  private constructor(private readonly target: number) {}

  /** @param hosts on which the listener is, with this port, and the line on one port too */
  static async to(hosts: readonly string[], target: number): Promise<Line> {
    const line = new Line(target);
    for (const host of hosts) {
      const server = createServer({ pauseOnConnect: true }, (socket) => line.#carry(socket, host));
      await once(server.listen(line.#port, host), 'listening');
      line.#port = (server.address() as { port: number }).port;
      line.#servers.push(server);
    }
    return line;
  }

  get port(): number {
    return this.#port;
  }

  /** What is under way comes through when it is whole again, as TCP sees to it. */
  cut(): void {
    this.#isCut = true;
    for (const pair of this.#pairs) for (const socket of pair) socket.unpipe().pause();
  }

  heal(): void {
    this.#isCut = false;
    for (const pair of this.#pairs) join(pair);
  }

  close(): void {
    for (const server of this.#servers) server.close();
    for (const pair of this.#pairs) for (const socket of pair) socket.destroy();
  }

  #carry(near: Socket, host: string): void {
    const pair = [near, connect(this.target, host)] as const;
    this.#pairs.add(pair);
    for (const [socket, other] of [pair, pair.toReversed() as [Socket, Socket]]) {
      socket.on('error', () => other.destroy());
      socket.on('close', () => {
        this.#pairs.delete(pair);
        other.destroy();
      });
    }
    if (!this.#isCut) join(pair);
  }
}

function join([one, other]: readonly [Socket, Socket]): void {
  one.pipe(other);
  other.pipe(one);
}
