// Reads proto/vtpm/v1/*.proto and writes proto/src/generated/messages.ts: one interface per message and the
// descriptor that the codec runs on. 64-bit integers are bigint, enums are unions of their names.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import protobuf from 'protobufjs';

const protoRoot = fileURLToPath(new URL('../proto/', import.meta.url));
const outFile = join(protoRoot, 'src/generated/messages.ts');

const root = new protobuf.Root();
root.resolvePath = (_origin, target) => join(protoRoot, target);
const files = readdirSync(join(protoRoot, 'vtpm/v1'))
  .filter((name) => name.endsWith('.proto'))
  .sort();
root.loadSync(
  files.map((name) => `vtpm/v1/${name}`),
  { keepCase: false },
);
root.resolveAll();

const scalar = {
  string: 'string',
  bool: 'boolean',
  bytes: 'Uint8Array',
  uint32: 'number',
  int32: 'number',
  uint64: 'bigint',
};

function typeOf(field) {
  const resolved = field.resolvedType;
  const base = resolved ? resolved.name : scalar[field.type];
  if (!base) throw new Error(`${field.fullName}: no TypeScript type for ${field.type}`);
  return field.repeated ? `${base}[]` : base;
}

function isOptional(field) {
  return (
    !field.repeated &&
    (field.resolvedType instanceof protobuf.Type || field.options?.proto3_optional === true)
  );
}

const out = [`// Generated from ${files.join(', ')} by scripts/generate-proto.mjs. Do not edit.`, ''];
const messageNames = [];
for (const item of root.lookup('vtpm.v1').nestedArray) {
  if (item instanceof protobuf.Enum) {
    const names = Object.keys(item.values).filter((name) => item.values[name] !== 0);
    out.push(`export type ${item.name} = ${names.map((name) => `'${name}'`).join(' | ')};`, '');
  } else if (item instanceof protobuf.Type) {
    messageNames.push(item.name);
    out.push(`export interface ${item.name} {`);
    for (const field of item.fieldsArray)
      out.push(`  ${field.name}${isOptional(field) ? '?' : ''}: ${typeOf(field)};`);
    out.push('}', '');
  }
}
out.push('export interface Messages {', ...messageNames.map((name) => `  ${name}: ${name};`), '}', '');
// The services are for the .proto's readers and for tests; the codec needs the messages alone.
out.push(`export const descriptor: object = ${JSON.stringify(root.toJSON())};`, '');
mkdirSync(join(protoRoot, 'src/generated'), { recursive: true });
const text = out.join('\n');
let old = '';
try {
  old = readFileSync(outFile, 'utf8');
} catch {}
if (text !== old) writeFileSync(outFile, text);
