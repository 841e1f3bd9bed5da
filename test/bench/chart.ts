import { figure } from './report.js';
import type { Row } from './row.js';

const LEFT = 300;
const SCALE_WIDTH = 520;
const RIGHT = 130;
const LINE = 22;
const TOP = 64;
/** Ends of the logarithmic scale. */
const LEAST = 0.1;
const MOST = 100;

/** The rows with a peer as bars from "as fast as the peer", on a logarithmic scale. */
export function chart(rows: readonly Row[], subtitle: string): string {
  const compared = rows.filter((row) => row.ratio !== null);
  const width = LEFT + SCALE_WIDTH + RIGHT;
  const height = TOP + compared.length * LINE + 30;
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12">`,
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    text(16, 24, 'Ratio to the peer (p50): left of 1 is better', 'font-size="15" font-weight="bold"'),
    text(16, 44, subtitle, 'fill="#555"'),
  ];
  for (const tick of [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]) {
    const x = position(tick);
    const colour = tick === 1 ? '#333' : '#ddd';
    parts.push(`<line x1="${x}" y1="${TOP - 4}" x2="${x}" y2="${height - 26}" stroke="${colour}"/>`);
    parts.push(text(x, height - 10, `${tick}`, 'text-anchor="middle" fill="#555"'));
  }
  compared.forEach((row, index) => {
    const y = TOP + index * LINE;
    const from = position(1);
    const to = position(row.ratio ?? 1);
    const bar = `x="${Math.min(from, to)}" y="${y + 2}" width="${Math.max(1, Math.abs(to - from))}" height="${LINE - 8}"`;
    parts.push(text(LEFT - 10, y + 14, row.name, 'text-anchor="end"'));
    parts.push(`<rect ${bar} fill="${(row.ratio ?? 1) > 1 ? '#c26a2d' : '#2d7dc2'}"/>`);
    const label = `${(row.ratio ?? 1).toFixed(2)} (${figure(row.ours.p50)} ${row.unit})`;
    parts.push(text(Math.max(from, to) + 6, y + 14, label, 'fill="#333"'));
  });
  return `${[...parts, '</svg>'].join('\n')}\n`;
}

function position(ratio: number): number {
  const clamped = Math.min(MOST, Math.max(LEAST, ratio));
  const share = Math.log(clamped / LEAST) / Math.log(MOST / LEAST);
  return Math.round((LEFT + share * SCALE_WIDTH) * 10) / 10;
}

function text(x: number, y: number, content: string, attributes: string): string {
  const escaped = content.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
  return `<text x="${x}" y="${y}" ${attributes}>${escaped}</text>`;
}
