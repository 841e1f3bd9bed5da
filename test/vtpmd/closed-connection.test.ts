import assert from 'node:assert/strict';
import { closeSync } from 'node:fs';
import { socketPair } from 'vtpm-common';
import { receiveNow, sendNow } from 'vtpmd/channels/socket-io';
import { TpmConnection } from 'vtpmd/channels/tpm-connection';
import type { CommandQueue } from 'vtpmd/worker/command-queue';
import type { CommandSource } from 'vtpmd/worker/command-source';
import { until } from '../support/until.js';

const GET_RANDOM = Buffer.from('80010000000c0000017b0008', 'hex');

describe('a connection that closes while its command runs', () => {
  it("I-2 its answer never goes to the connection that got its descriptor's number", async () => {
    let running: CommandSource | undefined;
    const queue = {
      submit: (source: CommandSource) => {
        running = source;
      },
    } as unknown as CommandQueue;
    const [client, worker] = socketPair();
    let closed = 0;
    const connection = new TpmConnection(worker, queue, { onClosed: () => closed++ });
    assert.equal(sendNow(client, GET_RANDOM), GET_RANDOM.length);
    const command = await until('the command came', () => running);
    // The descriptor is closed at once, the event says so a turn of the event loop later.
    connection.close();
    const others: [number, number][] = [];
    while (!others.some((pair) => pair.includes(worker))) others.push(socketPair());
    command.answer(Buffer.from('another client must not see this'));
    const seen = Buffer.alloc(64);
    for (const fd of others.flat()) assert.equal(receiveNow(fd, seen), -1);
    await until('the connection is closed', () => closed > 0);
    assert.equal(closed, 1);
    for (const fd of [client, ...others.flat()]) closeSync(fd);
  });
});
