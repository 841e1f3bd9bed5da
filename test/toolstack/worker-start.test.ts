import assert from 'node:assert/strict';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { receiveDescriptor, SystemCallError, sendDescriptor, socketPair } from 'vtpm-common';
import type { SupervisorMessage } from 'vtpm-toolstack/supervisor/control-protocol';
import type { Visit } from 'vtpm-toolstack/supervisor/doors';
import { passVisits } from 'vtpm-toolstack/supervisor/worker-start';
import { isA } from '../support/is-a.js';

describe('the connections that the next worker of a vTPM gets', () => {
  it('wait where the kernel holds no more descriptors for it', async () => {
    const [ours, theirs] = socketPair();
    const [guest, other] = socketPair();
    const socket = new Socket({ fd: guest, readable: false });
    const visits: Visit[] = Array.from({ length: 100 }, (_, at) => ({
      ...{ door: 'tpm', id: at + 1, peer: undefined, socket },
    }));
    let before = 0;
    assert.throws(
      () => {
        for (;;) {
          sendDescriptor(ours, guest);
          before++;
        }
      },
      (error) => isA(error, SystemCallError),
    );
    const passed: SupervisorMessage[] = [];
    const worker = {
      pass: (descriptor: number, message: SupervisorMessage) => {
        sendDescriptor(ours, descriptor);
        passed.push(message);
      },
    };
    const whenPassed = passVisits(worker, visits);
    assert.deepEqual(passed, [], 'positive control: nothing could be passed');
    let received = 0;
    const take = (): void => {
      for (let fd = receiveDescriptor(theirs); fd !== undefined; fd = receiveDescriptor(theirs)) {
        closeSync(fd);
        received++;
      }
    };
    take();
    await whenPassed;
    take();
    assert.equal(received, before + visits.length);
    assert.deepEqual(
      passed,
      visits.map(({ door, id, peer }) => ({ type: 'connection', door, id, peer })),
    );
    socket.destroy();
    for (const fd of [ours, theirs, other]) closeSync(fd);
  });
});
