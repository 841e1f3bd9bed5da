import type { Readable, Writable } from 'node:stream';
import type { TpmChannel } from './channel.js';
import { FrontendError } from './error.js';
import { MessageAssembler } from './framing.js';

/**
 * Carries TPM commands from `input` to the vTPM and its answers to `output`, one at a time, until `input` ends.
 * This is what tpm2-tss expects of the program behind its `cmd` TCTI.
 * @throws FrontendError `bad-command` for input that is no TPM command, and what `transmit` throws
 */
export async function bridgeStdio(client: TpmChannel, input: Readable, output: Writable): Promise<void> {
  const assembler = new MessageAssembler();
  const isOver = { value: false };
  // A vTPM that goes away while nothing is asked of it ends the bridge too: its peer sees the end at once.
  void client.ended.then((reason) => {
    if (!isOver.value) input.destroy(reason);
  });
  try {
    for await (const chunk of input) {
      for (const command of commandsIn(assembler, chunk as Buffer)) {
        await write(output, await client.transmit(command));
      }
    }
  } finally {
    isOver.value = true;
  }
  if (assembler.pendingBytes > 0) {
    throw new FrontendError(
      'bad-command',
      `the input ended within a TPM command, after ${assembler.pendingBytes} of its bytes`,
    );
  }
}

function commandsIn(assembler: MessageAssembler, chunk: Buffer): Buffer[] {
  try {
    return assembler.push(chunk);
  } catch (cause) {
    throw new FrontendError(
      'bad-command',
      'the input is not a sequence of TPM commands; this command is meant for a program (see --help)',
      cause,
    );
  }
}

async function write(output: Writable, bytes: Buffer): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    output.write(bytes, (error) => (error ? reject(error) : resolve()));
  });
}
