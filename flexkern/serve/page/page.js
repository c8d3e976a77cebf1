// The page: it asks the API that anybody may ask, and keeps nothing but the token, until the tab is closed.

import { draw } from "./chart.js";

const $ = (id) => document.getElementById(id);
const KEY = "flexkern-token";
const PAGE = 50; // videos that are asked for at a time
const videos = new Map(); // by id, the newest first
const pictures = new Map(); // id: address of its small picture
const picked = new Set(); // ids to compare
let watched = null; // id of the video that is shown as it grows
let chosen = false; // whether somebody chose it
let following = null; // ends the connection that follows it
let chunks = [];
let more = false;
let card = null; // what the server makes

// ---- the server

class Refused extends Error {
  constructor(status, problem, after) {
    super(problem.message);
    Object.assign(this, { status, code: problem.code, param: problem.param, after });
  }
}

function headers(given = {}) {
  const token = sessionStorage.getItem(KEY);
  return token ? { ...given, Authorization: `Bearer ${token}` } : given;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
  if (answer.ok) return answer;
  let problem = { message: `the server says ${answer.status}`, code: "unknown" };
  try { problem = (await answer.json()).error ?? problem; } catch { /* no body */ }
  if (answer.status === 401) askForToken(sessionStorage.getItem(KEY) ? "The server does not take this token." : "");
  throw new Refused(answer.status, problem, answer.headers.get("Retry-After"));
}

const get = async (path) => (await ask(path)).json();

/** Server-sent events, with a token where there is one, which EventSource cannot send. */
async function follow(path, heard, signal) {
  const answer = await ask(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (kind && data) heard(kind, JSON.parse(data));
    }
  }
}

async function addressOf(path) {
  return URL.createObjectURL(await (await ask(path)).blob());
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// ---- words

const LABELS = { queued: "Waiting", in_progress: "Being made", completed: "Done", failed: "Failed" };
const say = (text) => { $("said").textContent = text; };
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const title = (video) => video.prompt + (video.prompts.length > 1 ? ` (and ${video.prompts.length - 1} more)` : "");

function clock(seconds) {
  const whole = Math.max(0, seconds);
  const minutes = Math.floor(whole / 60);
  return `${minutes}:${(whole - minutes * 60).toFixed(1).padStart(4, "0")}`;
}

function meta(video, before) {
  const changed = Object.entries(video.overrides).map(([name, value]) => `${name} ${JSON.stringify(value)}`);
  const facts = [video.preset, ...changed, `seed ${video.seed}`, `${video.seconds} s`, video.size.replace("x", "×")];
  if (video.status === "queued" && before !== undefined) facts.push(before ? `${before} before it` : "next");
  if (video.status === "in_progress") facts.push(`${video.progress} %`);
  if (video.render_seconds) facts.push(`made in ${clock(video.render_seconds)}`);
  return facts.join(" · ");
}

// ---- the form

function addPrompt(entry = null, focus = false) {
  const row = $("prompt-row").content.cloneNode(true).firstElementChild;
  const times = [...document.querySelectorAll(".at-input")].map((input) => Number(input.value) || 0);
  const first = !times.length;
  row.querySelector(".at-input").value = entry ? entry.at : first ? 0 : Math.max(...times) + 4;
  row.querySelector(".text-input").value = entry ? entry.prompt : first ? card?.example ?? "" : "";
  row.querySelector(".cut-input").checked = Boolean(entry?.cut);
  row.querySelector(".remove").addEventListener("click", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    nameRows();
    (next?.querySelector(".text-input") ?? $("add")).focus();
    say("Prompt removed");
  });
  $("prompts").append(row);
  nameRows();
  if (!entry && !first) $("seconds").value = Math.max(Number($("seconds").value), Math.max(...times) + 8);
  if (focus) row.querySelector(".text-input").focus();
}

function nameRows() {
  const rows = [...$("prompts").children];
  rows.forEach((row, i) => {
    row.classList.toggle("only", rows.length === 1);
    row.querySelector(".text-input").setAttribute("aria-label", rows.length === 1 ? "Prompt" : `Prompt ${i + 1}`);
    row.querySelector(".at-input").setAttribute("aria-label", `Prompt ${i + 1} begins at, in seconds`);
    row.querySelector(".remove").setAttribute("aria-label", `Remove prompt ${i + 1}`);
    row.querySelector(".cut-input").setAttribute("aria-label", `Cut to prompt ${i + 1}: begin a new scene`);
    const begins = row.querySelector(".at-input");
    begins.readOnly = i === 0;
    if (i === 0) begins.value = 0;
    row.querySelector(".cut").hidden = i === 0;
  });
}

function readOverrides(text) {
  const found = {};
  for (const line of text.split("\n").map((one) => one.trim()).filter(Boolean)) {
    const [, name, value] = /^([\w.]+)\s*[=:]\s*(.+)$/.exec(line) ?? [];
    if (!name) throw new Refused(0, { message: `expected NAME = VALUE, got ${line}`, param: "overrides" });
    try { found[name] = JSON.parse(value); } catch { found[name] = value; }
  }
  return found;
}

function readForm() {
  const rows = [...$("prompts").children].map((row) => ({
    at: Number(row.querySelector(".at-input").value),
    prompt: row.querySelector(".text-input").value.trim(),
    cut: row.querySelector(".cut-input").checked,
  }));
  const asked = { preset: $("preset").value };
  if (rows.some((row) => !row.prompt)) throw new Refused(0, { message: "Say what the video shows.", param: "prompt" });
  if (rows.length === 1) asked.prompt = rows[0].prompt;
  else asked.prompts = rows.map((row, i) => (i ? row : { at: row.at, prompt: row.prompt }));
  if ($("seconds").value) asked.seconds = Number($("seconds").value);
  if ($("seed").value) asked.seed = Number($("seed").value);
  const overrides = readOverrides($("overrides").value);
  if (Object.keys(overrides).length) asked.overrides = overrides;
  return asked;
}

function showProblem(error) {
  clearProblem();
  const after = error.status === 429 && error.after ? ` The server asks to wait ${error.after} seconds.` : "";
  $("problem").textContent = error.message + (error.message.includes(error.after) ? "" : after);
  $("problem").hidden = false;
  const fields = {
    prompt: document.querySelector(".text-input"), prompts: document.querySelector(".text-input"), seconds: $("seconds"),
    frames: $("seconds"), seed: $("seed"), preset: $("preset"), overrides: $("overrides"),
  };
  const field = fields[error.param];
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "problem");
  if (field === $("overrides")) field.closest("details").open = true;
  field.focus();
}

function clearProblem() {
  $("problem").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  $("seconds").setAttribute("aria-describedby", "seconds-hint");
}

async function submit(event) {
  event.preventDefault();
  clearProblem();
  $("submit").disabled = true;
  try {
    const body = JSON.stringify(readForm());
    const made = await ask("/v1/videos", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const video = await made.json();
    put(video);
    say(`Asked for: ${title(video)}`);
  } catch (error) {
    showProblem(error);
  } finally {
    $("submit").disabled = false;
  }
}

function useAgain(video) {
  $("prompts").replaceChildren();
  const entries = video.prompts.length > 1
    ? video.prompts.map((one, i) => (typeof one === "string" ? { at: i * 4, prompt: one } : one))
    : [{ at: 0, prompt: video.prompt }];
  entries.forEach((entry) => addPrompt(entry));
  $("seconds").value = video.seconds;
  $("seed").value = video.seed;
  $("preset").value = video.preset;
  $("overrides").value = Object.entries(video.overrides).map(([name, value]) => `${name} = ${JSON.stringify(value)}`).join("\n");
  $("overrides").closest("details").open = Boolean($("overrides").value);
  clearProblem();
  document.querySelector(".text-input").focus();
  say("The form has what this video was made of");
}

// ---- the list

const isOver = (video) => ["completed", "failed"].includes(video.status);

/** listed: it comes from a list, the newest first, and not from something that has just happened. */
function put(video, listed = false) {
  const before = videos.get(video.id);
  if (before && isOver(before) && !isOver(video)) return; // an answer that was overtaken: what is over stays over
  videos.set(video.id, video);
  if (before && before.status !== video.status) {
    const why = video.error ? `: ${video.error.message}` : "";
    say(`${LABELS[video.status]}: ${title(video)}${why}`);
  }
  showRow(video, listed);
  showCounts();
  choose();
  if (video.id === watched) showNow();
}

function drop(id) {
  const row = document.querySelector(`[data-id="${id}"]`);
  if (row?.contains(document.activeElement)) {
    (row.nextElementSibling ?? row.previousElementSibling ?? $("videos")).querySelector("button")?.focus();
  }
  row?.remove();
  videos.delete(id);
  picked.delete(id);
  if (pictures.has(id)) URL.revokeObjectURL(pictures.get(id));
  pictures.delete(id);
  if (id === watched) { chosen = false; watch(null); }
  showCounts();
  choose();
}

function showRow(video, listed = false) {
  let row = document.querySelector(`[data-id="${video.id}"]`);
  if (!row) {
    row = makeRow(video.id);
    const age = (other) => videos.get(other.dataset.id).created_at - video.created_at; // of one second several may be
    const older = [...$("list").children].find((other) => (listed ? age(other) < 0 : age(other) <= 0));
    if (older) older.before(row); else $("list").append(row);
  }
  row.dataset.status = video.status;
  row.querySelector(".status").textContent = LABELS[video.status];
  row.querySelector(".prompt").textContent = title(video);
  row.querySelector(".meta").textContent = meta(video);
  const why = row.querySelector(".why");
  why.hidden = !video.error;
  why.textContent = video.error ? `${video.error.code}: ${video.error.message}` : "";
  const is = (...statuses) => statuses.includes(video.status);
  const show = (name, visible) => { row.querySelector(name).hidden = !visible; };
  show(".watch-button", is("in_progress") && video.id !== watched);
  show(".play-button", is("completed"));
  show(".pick", is("completed"));
  show(".cancel-button", !isOver(video));
  show(".delete-button", isOver(video));
  for (const button of row.querySelectorAll("button, .pick-input")) {
    const word = button.closest("label")?.textContent.trim() ?? button.textContent;
    button.setAttribute("aria-label", `${word}: ${title(video)}, seed ${video.seed}, ${video.preset}`);
  }
  if (is("completed")) showThumbnail(video.id, row);
}

function makeRow(id) {
  const row = $("video-row").content.cloneNode(true).firstElementChild;
  row.dataset.id = id;
  const on = (name, act) => row.querySelector(name).addEventListener("click", () => act(videos.get(id)));
  on(".watch-button", () => { chosen = true; watch(id); });
  on(".play-button", () => openScreens([id]));
  on(".again-button", useAgain);
  on(".cancel-button", () => act(`/v1/videos/${id}/cancel`, "POST"));
  on(".delete-button", () => act(`/v1/videos/${id}`, "DELETE"));
  row.querySelector(".pick-input").addEventListener("change", (event) => {
    event.target.checked ? picked.add(id) : picked.delete(id);
    showCounts();
  });
  return row;
}

async function act(path, method) {
  try {
    const answer = await (await ask(path, { method })).json();
    if (answer.object === "video.deleted") { drop(answer.id); say("Deleted"); } else put(answer);
  } catch (error) {
    say(error.message);
  }
}

async function showThumbnail(id, row) {
  if (pictures.has(id)) return;
  pictures.set(id, "");
  try {
    const address = await addressOf(`/v1/videos/${id}/content?variant=thumbnail`);
    pictures.set(id, address);
    const image = row.querySelector(".thumb img");
    image.src = address;
    image.hidden = false;
  } catch { /* a video without a small picture is one all the same */ }
}

function showCounts() {
  const count = (status) => [...videos.values()].filter((video) => video.status === status).length;
  const facts = [["queued", "waiting"], ["in_progress", "being made"], ["completed", "done"], ["failed", "failed"]];
  $("counts").textContent = facts.filter(([status]) => count(status)).map(([status, word]) => `${count(status)} ${word}`).join(" · ");
  let before = 0; // of those that wait, the oldest is made first
  for (const row of [...$("list").children].reverse()) {
    const video = videos.get(row.dataset.id);
    if (video.status === "queued") row.querySelector(".meta").textContent = meta(video, before++);
  }
  $("none").hidden = videos.size > 0;
  $("more").hidden = !more;
  $("compare-button").disabled = picked.size !== 2;
  $("compare-button").textContent = picked.size > 2 ? `Compare two (${picked.size} are picked)` : "Compare two";
}

/** Puts what a list has, and in its order: of videos of one second only the server knows which came first. */
function putListed(list) {
  list.forEach((video) => put(video, true));
  const rows = list.map((video) => document.querySelector(`[data-id="${video.id}"]`));
  rows.forEach((row, i) => { // one may stand there already, from news that came before the list
    const newer = rows[i - 1];
    if (newer && newer.compareDocumentPosition(row) & Node.DOCUMENT_POSITION_PRECEDING) newer.after(row);
  });
}

async function loadOlder() {
  const oldest = [...$("list").children].at(-1)?.dataset.id;
  const page = await get(`/v1/videos?limit=${PAGE}${oldest ? `&after=${oldest}` : ""}`);
  more = page.has_more;
  putListed(page.data);
  showCounts();
}

// ---- the video that grows

function choose() {
  const now = videos.get(watched);
  if (chosen && now && now.status === "in_progress") return;
  const running = [...videos.values()].find((video) => video.status === "in_progress");
  if (running && (!now || now.status !== "in_progress")) { chosen = false; watch(running.id); }
}

function watch(id) {
  if (id === watched) return;
  const before = watched;
  watched = id;
  following?.abort();
  following = null;
  chunks = [];
  $("preview").hidden = true;
  $("preview-none").hidden = false;
  if (before && videos.has(before)) showRow(videos.get(before));
  if (!id) return showNow();
  showRow(videos.get(id));
  showNow();
  const mine = (following = new AbortController());
  follow(`/v1/videos/${id}/events`, (kind, content) => {
    if (kind !== "chunk" || mine.signal.aborted) return;
    chunks.push(content);
    showChunk(content);
  }, mine.signal).catch(() => {});
}

function showNow() {
  const video = videos.get(watched);
  $("idle").hidden = Boolean(video);
  $("now").hidden = !video;
  $("watch-title").textContent = !video || video.status === "in_progress" ? "Being made" : `${LABELS[video.status]}, as it was made`;
  if (!video) return;
  const [wide, high] = video.size.split("x");
  document.querySelector(".now .screen").style.setProperty("--shape", `${wide} / ${high}`);
  $("now-prompt").textContent = title(video);
  $("now-meta").textContent = meta(video);
  $("now-count").textContent = `${video.made} of ${plural(video.frames, "picture")}`;
  $("now-progress").value = video.progress;
  $("now-cancel").hidden = isOver(video);
  if (video.status !== "in_progress") $("now-left").textContent = video.error ? video.error.message : "";
  $("chart-said").textContent = draw($("chart"), chunks);
}

let drawing = false;
let looked = -Infinity;
let looking = 0; // the timer of the next look: the newest picture is always looked at in the end
function showChunk(chunk) {
  if (chunk.left_seconds !== undefined && videos.get(watched)?.status === "in_progress") {
    $("now-left").textContent = `about ${clock(chunk.left_seconds)} left`;
  }
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    $("chart-said").textContent = draw($("chart"), chunks);
    looking ||= setTimeout(() => {
      looking = 0;
      looked = performance.now();
      look(watched);
    }, Math.max(0, looked + 900 - performance.now()));
  });
}

async function look(id) {
  try {
    const address = await addressOf(`/v1/videos/${id}/content?variant=preview`);
    if (id !== watched) return URL.revokeObjectURL(address);
    const before = $("preview").src;
    $("preview").src = address;
    $("preview").alt = `Newest picture of: ${title(videos.get(id))}`;
    $("preview").hidden = false;
    $("preview-none").hidden = true;
    if (before) URL.revokeObjectURL(before);
  } catch { /* none yet, or it is whole */ }
}

// ---- playing one, comparing two

let screens = [];

async function openScreens(ids) {
  closeScreens();
  $("compare").hidden = false;
  $("compare-title").textContent = ids.length > 1 ? "Compare" : "Play";
  $("compare-title").focus();
  $("compare").scrollIntoView({ block: "nearest" });
  for (const [i, id] of ids.entries()) {
    const video = videos.get(id);
    const figure = document.createElement("figure");
    const frame = document.createElement("div");
    const film = document.createElement("video");
    const caption = document.createElement("figcaption");
    const name = document.createElement("p");
    const facts = document.createElement("p");
    const [wide, high] = video.size.split("x");
    frame.className = "screen";
    frame.style.setProperty("--shape", `${wide} / ${high}`);
    name.className = "prompt";
    facts.className = "quiet";
    name.textContent = (ids.length > 1 ? `${"AB"[i]}: ` : "") + title(video);
    facts.textContent = meta(video);
    caption.append(name, facts);
    film.muted = film.playsInline = true;
    film.setAttribute("aria-label", `Video ${ids.length > 1 ? "AB"[i] : ""}: ${title(video)}`);
    frame.append(film);
    figure.append(frame, caption);
    $("screens").append(figure);
    screens.push(film);
    film.addEventListener("error", () => { facts.textContent = "This browser cannot play it (H.264 in MP4)."; facts.className = "problem"; });
    film.addEventListener("ended", ended);
    film.addEventListener("timeupdate", showTime);
    film.addEventListener("loadedmetadata", showTime);
    try { film.src = await addressOf(`/v1/videos/${id}/content`); } catch (error) { facts.textContent = error.message; facts.className = "problem"; }
  }
}

const lead = () => screens.reduce((one, other) => (!one || other.duration > one.duration ? other : one), null);

function closeScreens() {
  for (const film of screens) {
    film.pause();
    if (film.src) URL.revokeObjectURL(film.src);
  }
  screens = [];
  $("screens").replaceChildren();
  $("play").textContent = "Play";
}

function toggle() {
  const goes = lead() && !lead().paused;
  if (!goes && lead()?.ended) seekTo(0);
  for (const film of screens) goes ? film.pause() : film.play().catch(() => {});
  $("play").textContent = goes ? "Play" : "Pause";
}

function seekTo(seconds) {
  for (const film of screens) film.currentTime = Math.min(seconds, film.duration || 0);
}

function showTime() {
  const film = lead();
  if (!film?.duration) return;
  for (const other of screens) { // that they go in step
    const apart = Math.abs(other.currentTime - Math.min(film.currentTime, other.duration));
    if (other !== film && !film.paused && apart > 0.12) other.currentTime = Math.min(film.currentTime, other.duration);
  }
  $("clock").textContent = `${clock(film.currentTime)} / ${clock(film.duration)}`;
  if (document.activeElement !== $("seek") || !film.paused) $("seek").value = (1000 * film.currentTime) / film.duration;
  $("seek").setAttribute("aria-valuetext", `${clock(film.currentTime)} of ${clock(film.duration)}`);
}

function ended(event) {
  if (event.target !== lead()) return;
  if ($("loop").checked) {
    seekTo(0);
    for (const film of screens) film.play().catch(() => {});
  } else {
    $("play").textContent = "Play";
  }
}

// ---- the token

function askForToken(problem) {
  if ($("token-dialog").open) return;
  $("token-button").hidden = false;
  $("token-problem").hidden = !problem;
  $("token-problem").textContent = problem;
  $("token").value = "";
  $("token-dialog").showModal();
}

// ---- the connection

function showLink(state, text) {
  $("link").dataset.state = state;
  if ($("link-text").textContent !== text) $("link-text").textContent = text;
}

async function begin() {
  card = (await get("/v1/models")).data[0];
  $("model").textContent = `${card.id}, ${card.size.replace("x", "×")}, ${card.fps} pictures a second`;
  $("seconds-hint").textContent = `at most ${card.max_seconds}`;
  $("seconds").max = card.max_seconds;
  if (!$("preset").options.length) {
    $("preset").replaceChildren(...card.presets.map((name) => new Option(name, name)));
    $("preset").value = card.preset;
  }
  if (!$("prompts").children.length) addPrompt();
}

async function live() {
  let pause = 500;
  for (;;) {
    try {
      await begin();
      const listening = follow("/v1/events", (kind, content) => {
        if (kind === "video") put(content);
        if (kind === "deleted") drop(content.id);
      });
      const page = await get(`/v1/videos?limit=${PAGE}`);
      const there = new Set(page.data.map((video) => video.id));
      if (!page.has_more) [...videos.keys()].filter((id) => !there.has(id)).forEach(drop);
      more = page.has_more;
      putListed(page.data);
      showCounts();
      showLink("up", "connected");
      pause = 500;
      await listening;
    } catch (error) {
      if (error.status === 401) {
        showLink("down", "needs its token");
        await new Promise((done) => $("token-dialog").addEventListener("close", done, { once: true }));
        continue;
      }
    }
    showLink("down", "not connected, trying again");
    await wait(pause);
    pause = Math.min(pause * 2, 10000);
  }
}

$("form").addEventListener("submit", submit);
$("add").addEventListener("click", () => addPrompt(null, true));
$("more").addEventListener("click", () => loadOlder().catch((error) => say(error.message)));
$("now-cancel").addEventListener("click", () => act(`/v1/videos/${watched}/cancel`, "POST"));
$("compare-button").addEventListener("click", () => openScreens([...picked]));
$("compare-close").addEventListener("click", () => {
  closeScreens();
  $("compare").hidden = true;
  $("videos").focus();
});
$("play").addEventListener("click", toggle);
$("seek").addEventListener("input", () => { if (lead()?.duration) seekTo(($("seek").value / 1000) * lead().duration); });
$("token-button").addEventListener("click", () => askForToken(""));
$("token-form").addEventListener("submit", () => {
  sessionStorage.setItem(KEY, $("token").value.trim());
  $("token").value = "";
});
live();
