// Bars of seconds per chunk, denoising and decoding on top of each other, and what it waited for the chunk before to be
// written; wide videos are shown in groups.

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 640, HIGH = 150, MOST = 120; // units of the picture; bars, at most

const part = (chunk, name) => chunk[`${name}_seconds`] ?? 0;
const whole = (chunk) => part(chunk, "denoise") + part(chunk, "decode") + part(chunk, "waited");

/** Neighbours as one, so that there are at most so many. */
export function grouped(chunks, most = MOST) {
  const size = Math.ceil(chunks.length / most);
  const found = [];
  for (let i = 0; i < chunks.length; i += size) {
    const group = chunks.slice(i, i + size);
    const mean = (name) => group.reduce((sum, chunk) => sum + part(chunk, name), 0) / group.length;
    found.push({ denoise_seconds: mean("denoise"), decode_seconds: mean("decode"), waited_seconds: mean("waited") });
  }
  return found;
}

/** A height that is a little more than the highest bar, and easy to name. */
export function ceiling(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((step) => step * power).find((step) => step >= most * 1.05);
}

/** Seconds in few digits. */
export function short(seconds) {
  return seconds >= 100 ? seconds.toFixed(0) : seconds >= 1 ? seconds.toFixed(2) : seconds.toPrecision(2);
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Draw them; returns the sentence that says what there is to see. */
export function draw(svg, chunks) {
  svg.replaceChildren();
  if (!chunks.length) return "no chunk yet";
  const bars = grouped(chunks);
  const top = ceiling(Math.max(...bars.map(whole)));
  for (const share of [0.25, 0.5, 0.75]) {
    svg.append(shape("line", { class: "rule", x1: 0, x2: WIDE, y1: HIGH * share, y2: HIGH * share }));
  }
  const step = WIDE / Math.max(bars.length, 24);
  bars.forEach((bar, i) => {
    let y = HIGH;
    for (const [kind, name] of [["denoise", "denoise"], ["decode", "decode"], ["rest", "waited"]]) {
      const height = (part(bar, name) / top) * HIGH;
      y -= height;
      svg.append(shape("rect", { class: kind, x: i * step + step * 0.1, y, width: step * 0.8, height }));
    }
  });
  const all = chunks.map(whole).sort((a, b) => a - b);
  const middle = all[Math.floor(all.length / 2)];
  const last = whole(chunks[chunks.length - 1]);
  return `last ${short(last)}, median ${short(middle)}, of ${chunks.length}; the top is ${short(top)} seconds`;
}
