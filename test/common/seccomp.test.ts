import assert from 'node:assert/strict';
import fc from 'fast-check';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { ABSENT, type Allowance, type Architecture, type Stage, SYSCALLS } from 'vtpm-common/seccomp/table';

const ALLOW = 0x7fff0000;
const KILL = 0x80000000;
const EPERM = 0x00050001;
const ENOSYS = 0x00050026;
const AUDIT: Record<Architecture, number> = { x64: 0xc000003e, arm64: 0xc00000b7 };

interface Call {
  number: number;
  audit: number;
  args: bigint[];
}

/** Classic BPF as the kernel runs it for seccomp (linux/filter.h, seccomp_check_filter): written from that, not from filter.ts. */
function run(program: Buffer, { number, audit, args }: Call): number {
  const data = Buffer.alloc(64);
  data.writeUInt32LE(number, 0);
  data.writeUInt32LE(audit, 4);
  for (const [index, value] of args.entries()) data.writeBigUInt64LE(value, 16 + 8 * index);
  let accumulator = 0;
  for (let at = 0; ; ) {
    assert.ok(8 * at < program.length, 'the program runs past its end');
    const code = program.readUInt16LE(8 * at);
    const k = program.readUInt32LE(8 * at + 4);
    const jump = (isTrue: boolean): number => 1 + program.readUInt8(8 * at + (isTrue ? 2 : 3));
    switch (code) {
      case 0x20:
        assert.ok(k % 4 === 0 && k < 64, 'the kernel takes aligned words of seccomp_data only');
        accumulator = data.readUInt32LE(k);
        at++;
        break;
      case 0x54:
        accumulator = (accumulator & k) >>> 0;
        at++;
        break;
      case 0x15:
        at += jump(accumulator === k);
        break;
      case 0x35:
        at += jump(accumulator >= k);
        break;
      case 0x06:
        return k;
      default:
        assert.fail(`instruction ${code.toString(16)}`);
    }
  }
}

/** What the table says, without a program. */
function expected(stage: Stage, architecture: Architecture, { number, audit, args }: Call): number {
  if (audit !== AUDIT[architecture]) return KILL;
  if (architecture === 'x64' && number >= 0x40000000) return KILL;
  if (ABSENT[architecture].includes(number)) return ENOSYS;
  const allowance: Allowance =
    SYSCALLS.find((rule) => rule.numbers[architecture] === number)?.[stage] ?? 'no';
  if (typeof allowance === 'string') return allowance === 'yes' ? ALLOW : EPERM;
  const value = Number(BigInt.asUintN(32, args[allowance.argument]!) & BigInt(allowance.mask));
  return allowance.values.includes(value) ? ALLOW : EPERM;
}

const architectures = ['x64', 'arm64'] as const;
const stages = ['start', 'serve'] as const;
const listed = SYSCALLS.flatMap(({ numbers }) => Object.values(numbers)).filter((number) => number !== null);
/** Values that conditions are about, and their neighbours. */
const interesting = SYSCALLS.flatMap(({ start, serve }) => [start, serve])
  .flatMap((allowance) => (typeof allowance === 'string' ? [] : [...allowance.values, allowance.mask]))
  .flatMap((value) => [BigInt(value), BigInt(value) + 1n, BigInt(value) | (1n << 32n)]);

describe('seccomp filters', () => {
  it('give for every system call and argument what the table says', () => {
    const argument = fc.oneof(fc.constantFrom(...interesting), fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }));
    const call = fc.record({
      number: fc.oneof(
        { weight: 6, arbitrary: fc.constantFrom(...listed, 435) },
        { weight: 3, arbitrary: fc.integer({ min: 0, max: 600 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0xffffffff }) },
      ),
      args: fc.array(argument, { minLength: 6, maxLength: 6 }),
      audit: fc.oneof(
        { weight: 8, arbitrary: fc.constantFrom(...Object.values(AUDIT)) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0xffffffff }) },
      ),
    });
    for (const stage of stages) {
      for (const architecture of architectures) {
        const program = seccompFilter(stage, architecture);
        fc.assert(
          fc.property(call, (one) => {
            assert.equal(run(program, one), expected(stage, architecture, one));
          }),
          { numRuns: 4000 },
        );
      }
    }
  });

  it('allow while serving nothing that they did not allow at the start', () => {
    for (const { name, start, serve } of SYSCALLS) {
      if (serve === 'yes') assert.equal(start, 'yes', name);
      else if (serve !== 'no')
        assert.ok(start === 'yes' || JSON.stringify(start) === JSON.stringify(serve), name);
    }
  });

  it('name each call once', () => {
    for (const architecture of architectures) {
      const numbers = SYSCALLS.map(({ numbers }) => numbers[architecture]).filter(
        (number) => number !== null,
      );
      assert.equal(new Set(numbers).size, numbers.length);
    }
    assert.equal(new Set(SYSCALLS.map(({ name }) => name)).size, SYSCALLS.length);
  });

  it('leave a worker that serves no way to a file, a socket, a program, a process or a namespace', () => {
    const gone = {
      openat: 257,
      open: 2,
      creat: 85,
      openat2: 437,
      socket: 41,
      connect: 42,
      bind: 49,
      socketpair: 53,
    };
    const more = {
      accept: 43,
      accept4: 288,
      execve: 59,
      execveat: 322,
      fork: 57,
      vfork: 58,
      clone: 56,
      unshare: 272,
    };
    const rest = {
      setns: 308,
      ptrace: 101,
      process_vm_readv: 310,
      process_vm_writev: 311,
      kill: 62,
      prctl: 157,
    };
    const last = {
      seccomp: 317,
      bpf: 321,
      io_uring_setup: 425,
      userfaultfd: 323,
      mount: 165,
      setuid: 105,
      keyctl: 250,
    };
    const program = seccompFilter('serve', 'x64');
    fc.assert(
      fc.property(
        fc.constantFrom(...Object.entries({ ...gone, ...more, ...rest, ...last })),
        fc.array(fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }), { minLength: 6, maxLength: 6 }),
        ([, number], args) => {
          assert.equal(run(program, { number, args, audit: AUDIT.x64 }), EPERM);
        },
      ),
    );
  });

  it('are refused for an architecture without a table', () => {
    assert.throws(() => seccompFilter('start', 'riscv64'), /riscv64/);
  });
});
