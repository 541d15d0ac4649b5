// Figures in words.

export const TIERS = ["hbm", "dram", "ssd", "object"];

const TIER_NAMES = { hbm: "HBM", dram: "DRAM", ssd: "SSD", object: "object", none: "nowhere" };
const TIER_LETTERS = { hbm: "H", dram: "D", ssd: "S", object: "O", none: "–" };

const CAUSES = {
  never_stored: "new text",
  last_token: "last token",
  evicted: "evicted",
  declined: "not worth keeping",
  late: "not there in time",
  computed_sooner: "computed sooner than loaded",
  corrupt: "damaged",
  lost: "lost with its place",
  template_drift: "template drift",
  truncated: "truncated",
  reuse_off: "reuse is off",
};

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });

export const tierName = (tier) => TIER_NAMES[tier] ?? tier;
export const tierLetter = (tier) => TIER_LETTERS[tier] ?? tier.slice(0, 1).toUpperCase();
export const causeName = (cause) => CAUSES[cause] ?? cause.replaceAll("_", " ");
export const count = (number) => whole.format(number);
export const sum = (counts) => Object.values(counts ?? {}).reduce((total, number) => total + number, 0);

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (number >= 1023.5 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${number >= 10 || unit === 0 ? whole.format(number) : precise.format(number)} ${units[unit]}`;
}

export function milliseconds(number) {
  if (number === null || number === undefined) return "–";
  if (number >= 10_000) return `${whole.format(number / 1000)} s`;
  if (number >= 1000) return `${precise.format(number / 1000)} s`;
  if (number >= 10 || number === 0) return `${whole.format(number)} ms`;
  return number < 0.1 ? "< 0.1 ms" : `${precise.format(number)} ms`;
}

export function seconds(number) {
  return milliseconds(number * 1000);
}

export function times(ratio) {
  return ratio >= 10 ? whole.format(ratio) : precise.format(ratio);
}

/** "HBM, DRAM and SSD". */
export function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}
