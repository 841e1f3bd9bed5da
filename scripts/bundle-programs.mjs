// Makes one file of each program that is started often and all that it imports, in the dist/program of its package: most of
// what a short command took was to find and read hundreds of modules. The others (the swtpm drop-in, vtpm-frontend, the
// manager's store process) run from the modules, so a package needs both.
import { readFileSync } from 'node:fs';
import { relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const root = fileURLToPath(new URL('..', import.meta.url));
const PROGRAMS = {
  'toolstack/dist/program/vtpmctl': 'toolstack/dist/vtpmctl-main.js',
  'toolstack/dist/program/vtpm-supervisord': 'toolstack/dist/supervisor-main.js',
  'manager/dist/program/vtpm-managerd': 'manager/dist/main.js',
  'vtpmd/dist/program/vtpm-softtpm': 'vtpmd/dist/softtpm-main.js',
};

/** By the folder of its sources. */
const NAMES = {
  common: 'vtpm-common',
  toolstack: 'vtpm-toolstack',
  manager: 'vtpm-manager',
  vtpmd: 'vtpmd',
  'frontend-driver': 'vtpm-frontend-driver',
};

/** A module that asks where it is gets its own place, as if it were not in a bundle: an installation has both. */
const places = {
  name: 'places',
  setup({ onLoad }) {
    onLoad({ filter: /\/dist\/.*\.js$/ }, ({ path }) => {
      const [, folder, module] = /^([^/]+)\/dist\/(.*)\.js$/.exec(relative(root, path)) ?? [];
      if (folder === undefined) return undefined;
      const contents = readFileSync(path, 'utf8');
      if (!contents.includes('import.meta.')) return undefined;
      if (!(folder in NAMES) || /import\.meta\.(dirname|filename)/.test(contents))
        throw new Error(`${path} asks where it is in a way that a bundle does not answer`);
      const own = `import.meta.resolve('${NAMES[folder]}/${module}')`;
      return { contents: contents.replaceAll('import.meta.url', own), resolveDir: resolve(path, '..') };
    });
  },
};

/** What a supervisor's program loads before its bundle, and the bundle then shares with it. */
const earlySignals = {
  name: 'early-signals',
  setup({ onResolve }) {
    onResolve({ filter: /\/early-signals\.js$/ }, () => ({
      path: 'vtpm-toolstack/supervisor/handover/early-signals',
      external: true,
    }));
  },
};

await build({
  entryPoints: Object.fromEntries(
    Object.entries(PROGRAMS).map(([program, main]) => [program, `${root}${main}`]),
  ),
  outdir: root,
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  plugins: [places, earlySignals],
  // Of packages that are not modules.
  banner: {
    js: "import { createRequire as requireOf } from 'node:module';\nconst require = requireOf(import.meta.url);",
  },
  logLevel: 'warning',
});
