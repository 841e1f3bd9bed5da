import { runVtpmctl } from './cli/program.js';

// A reader that has seen enough, `vtpmctl logs | head` for example, is no failure.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0);
  throw error;
});

process.exitCode = await runVtpmctl(process.argv.slice(2));
