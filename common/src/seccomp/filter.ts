import { ABSENT, type Allowance, type Architecture, type Stage, SYSCALLS } from './table.js';

/** linux/filter.h: loads, comparisons and returns of a classic BPF program. */
const LOAD_WORD = 0x20;
const AND = 0x54;
const JUMP_EQUAL = 0x15;
const JUMP_GREATER_OR_EQUAL = 0x35;
const RETURN = 0x06;

/** linux/seccomp.h: struct seccomp_data { int nr; u32 arch; u64 instruction_pointer; u64 args[6]; }, little endian. */
const NUMBER_AT = 0;
const ARCHITECTURE_AT = 4;
const ARGUMENTS_AT = 16;

const ALLOW = 0x7fff0000;
const KILL_PROCESS = 0x80000000;
const ERRNO = 0x00050000;
const EPERM = 1;
const ENOSYS = 38;

/** linux/audit.h: little endian, 64 bits. */
const AUDIT_ARCH: Readonly<Record<Architecture, number>> = { x64: 0xc000003e, arm64: 0xc00000b7 };
/** unistd.h: calls of the x32 interface have this bit, and other numbers. */
const X32_BIT = 0x40000000;

/** The kernel takes no longer program (BPF_MAXINSNS). */
const MOST_INSTRUCTIONS = 4096;

type Instruction = readonly [code: number, ifTrue: number, ifFalse: number, value: number];

const load = (at: number): Instruction => [LOAD_WORD, 0, 0, at];
const give = (result: number): Instruction => [RETURN, 0, 0, result];

/**
 * The program of a stage, as the kernel takes it: 8 bytes for each instruction.
 *
 * What the table does not allow is answered EPERM and not by a kill: nothing is gained by a call that fails, and a call
 * that some other version of node or glibc makes, and can do without, must not cost a guest its TPM. A call of another
 * architecture's interface is no accident and kills.
 * @throws Error for an architecture without a table
 */
export function seccompFilter(stage: Stage, architecture: string = process.arch): Buffer {
  if (architecture !== 'x64' && architecture !== 'arm64') {
    throw new Error(`there is no table of system calls for ${architecture}`);
  }
  const program: Instruction[] = [
    load(ARCHITECTURE_AT),
    [JUMP_EQUAL, 1, 0, AUDIT_ARCH[architecture]],
    give(KILL_PROCESS),
    load(NUMBER_AT),
  ];
  if (architecture === 'x64') program.push([JUMP_GREATER_OR_EQUAL, 0, 1, X32_BIT], give(KILL_PROCESS));
  for (const rule of SYSCALLS) {
    const number = rule.numbers[architecture];
    const body = number === null ? [] : allowing(rule[stage]);
    if (number !== null && body.length > 0) program.push([JUMP_EQUAL, 0, body.length, number], ...body);
  }
  for (const number of ABSENT[architecture]) {
    program.push([JUMP_EQUAL, 0, 1, number], give(ERRNO | ENOSYS));
  }
  program.push(give(ERRNO | EPERM));
  return encode(program);
}

/** Ends the program in any case: what follows expects the call's number to be loaded. */
function allowing(allowance: Allowance): Instruction[] {
  if (allowance === 'no') return [];
  if (allowance === 'yes') return [give(ALLOW)];
  const { argument, mask, values } = allowance;
  return [
    load(ARGUMENTS_AT + 8 * argument),
    [AND, 0, 0, mask],
    // To the `ALLOW` behind the refusal.
    ...values.map((value, index): Instruction => [JUMP_EQUAL, values.length - index, 0, value]),
    give(ERRNO | EPERM),
    give(ALLOW),
  ];
}

function encode(program: readonly Instruction[]): Buffer {
  if (program.length > MOST_INSTRUCTIONS) throw new Error('the filter is longer than the kernel takes');
  const bytes = Buffer.alloc(8 * program.length);
  for (const [index, [code, ifTrue, ifFalse, value]] of program.entries()) {
    bytes.writeUInt16LE(code, 8 * index);
    bytes.writeUInt8(ifTrue, 8 * index + 2);
    bytes.writeUInt8(ifFalse, 8 * index + 3);
    bytes.writeUInt32LE(value >>> 0, 8 * index + 4);
  }
  return bytes;
}
