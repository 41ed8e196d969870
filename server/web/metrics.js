// Prometheus' text format, and what follows from it: sums, rates and quantiles.

/** [{name, labels, value}, …] */
export function parseMetrics(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
    }
    found.push({ name: match[1].replace(/^ensemble:/, ""), labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

const matching = (samples, name, labels = {}) =>
  samples.filter((sample) => sample.name === name && Object.entries(labels).every(([key, value]) => sample.labels[key] === value));

/** The sum over all samples of that name and these labels. */
export const sum = (samples, name, labels) => matching(samples, name, labels).reduce((total, sample) => total + sample.value, 0);

/** The sum for each value of one label. */
export function sumBy(samples, name, label) {
  const sums = {};
  for (const sample of matching(samples, name)) sums[sample.labels[label]] = (sums[sample.labels[label]] ?? 0) + sample.value;
  return sums;
}

/** The quantile (0 to 1) of a histogram, linear inside its bucket as Prometheus has it; null if it is empty. */
export function quantile(samples, name, q, labels) {
  const buckets = Object.entries(sumBy(matching(samples, `${name}_bucket`, labels), `${name}_bucket`, "le"))
    .map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count])
    .sort(([a], [b]) => a - b);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [lower, below] = [0, 0];
  for (const [upper, count] of buckets) {
    if (count >= q * total) return upper === Infinity ? lower : lower + ((upper - lower) * (q * total - below)) / (count - below || 1);
    [lower, below] = [upper, count];
  }
  return lower;
}
