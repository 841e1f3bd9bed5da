let number = 0;

export function say(text: string): void {
  console.log(`\n  ${text.replaceAll('\n', '\n  ')}\n`);
}

/** Plays one step and says what it showed. A string, or the `note` of an object, is what there was to see. */
export async function step<T>(title: string, proves: string, play: () => Promise<T>): Promise<T> {
  const start = performance.now();
  number += 1;
  const result = await play();
  const seconds = `${((performance.now() - start) / 1000).toFixed(1)} s`;
  console.log(`  ${number}. ${title.padEnd(60)} ${seconds.padStart(6)}`);
  console.log(`     shows: ${proves}`);
  const note = typeof result === 'string' ? result : (result as { note?: string } | undefined)?.note;
  if (note) console.log(`     ${note}`);
  return result;
}
