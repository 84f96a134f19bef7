// What the page does: take an image, ask the model, show text, confidences and attention.
"use strict";

const $ = (id) => document.getElementById(id);
const UNSURE = 0.9, DOUBT = 0.5; // confidences below which a character is marked
let about = null; // of the model
let image = null; // bytes that were read last
let shown = null; // address of the image as it was given
let reading = null;
let attention = null; // a byte for each cell of each character
let chosen = -1;
let number = 0; // of the latest request; an earlier one's answer is too late
let playing = null;

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The program behind this page does not answer. Start it again.");
  }
  const found = await answer.json().catch(() => ({ error: `The answer was ${answer.status}.` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// --- an image comes in -----------------------------------------------------------------------

async function readImage(blob) {
  const mine = ++number;
  stop();
  if (about && blob.size > about.max_bytes) {
    say(`The image has more than ${Math.round(about.max_bytes / 1e6)} MB. Scale it down.`, true);
    return;
  }
  say("Reading ...");
  try {
    const began = performance.now();
    const bytes = await blob.arrayBuffer();
    const found = await ask("/read", {
      method: "POST", body: bytes, headers: { "content-type": "application/octet-stream" },
    });
    if (mine !== number) return;
    image = bytes;
    if (shown) URL.revokeObjectURL(shown);
    shown = URL.createObjectURL(blob);
    showReading(found);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(`${found.characters.length} characters in ${seconds} s, mean confidence ${percent(found.confidence)}`);
  } catch (error) {
    if (mine === number) {
      $("result").hidden = true; // never an old text under a new image
      say(error.message, true);
    }
  }
}

function firstImage(files) {
  const found = [...files].find((file) => file.type.startsWith("image/"));
  if (found) readImage(found);
  else if (files.length) say("That is no image.", true);
}

$("file").addEventListener("change", (event) => {
  firstImage(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) firstImage(event.clipboardData.files);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // anywhere: a missed target would make the browser leave the page
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") firstImage(event.dataTransfer.files);
  });
}

function showExamples(count) {
  for (let index = 0; index < count; index++) {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    picture.src = `/examples/${index}`;
    picture.alt = `Example ${index + 1}`;
    button.append(picture);
    button.addEventListener("click", async () => {
      readImage(await (await fetch(picture.src)).blob());
    });
    $("examples").append(button);
  }
}

// --- drawing ---------------------------------------------------------------------------------

const strokes = []; // lists of [x, y] in pixels of the canvas

function preparePad([height, width]) {
  const surface = $("drawing");
  surface.width = width * 2; // twice the model's own, for smooth lines
  surface.height = height * 2;
  surface.style.aspectRatio = `${width} / ${height}`;
  drawStrokes();
}

function drawStrokes() {
  const surface = $("drawing"), pen = surface.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, surface.width, surface.height);
  pen.strokeStyle = pen.fillStyle = "black";
  pen.lineWidth = 5;
  pen.lineCap = pen.lineJoin = "round";
  for (const stroke of strokes) {
    pen.beginPath();
    pen.moveTo(...stroke[0]);
    for (const point of stroke) pen.lineTo(...point);
    pen.stroke();
  }
}

function place(event) {
  const surface = $("drawing"), box = surface.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * surface.width,
    ((event.clientY - box.top) / box.height) * surface.height,
  ];
}

$("drawing").addEventListener("pointerdown", (event) => {
  event.target.setPointerCapture(event.pointerId);
  strokes.push([place(event)]);
  drawStrokes();
});
$("drawing").addEventListener("pointermove", (event) => {
  if (!event.buttons || !strokes.length) return;
  for (const part of event.getCoalescedEvents?.() ?? [event]) strokes.at(-1).push(place(part));
  drawStrokes();
});
$("undo").addEventListener("click", () => { strokes.pop(); drawStrokes(); });
$("clear").addEventListener("click", () => { strokes.length = 0; drawStrokes(); });
$("read-drawing").addEventListener("click", () => {
  if (strokes.length) $("drawing").toBlob(readImage, "image/png");
  else say("Nothing is written yet.", true);
});

// --- the reading -----------------------------------------------------------------------------

function percent(share) {
  return `${(100 * share).toFixed(share > 0.995 ? 1 : 0)}%`;
}

function showReading(found) {
  reading = found;
  attention = found.attention && Uint8Array.from(atob(found.attention), (c) => c.charCodeAt(0));
  $("text").replaceChildren();
  found.characters.forEach(([character, confidence], index) => {
    const span = document.createElement("span");
    span.textContent = character === "\n" ? "⏎\n" : character;
    if (confidence < DOUBT) span.className = "doubt";
    else if (confidence < UNSURE) span.className = "unsure";
    else if (character === "\n") span.textContent = "\n";
    span.dataset.index = index;
    $("text").append(span);
  });
  if (!found.characters.length) $("text").textContent = "(nothing)";
  $("correction").value = found.text;
  $("saved").textContent = "";
  $("play").hidden = !attention;
  showImage();
  $("result").hidden = false;
  choose(-1);
}

function showImage() {
  $("image").src = $("as-model").checked ? reading.page : shown;
}
$("as-model").addEventListener("change", showImage);
$("image").addEventListener("error", () => {
  if ($("image").src !== reading.page) $("image").src = reading.page; // browsers know no TIFF
});

function choose(index) {
  $("text").querySelector(".chosen")?.classList.remove("chosen");
  chosen = index;
  const heat = $("heat").getContext("2d");
  if (index < 0 || !reading || index >= reading.characters.length) {
    heat.clearRect(0, 0, $("heat").width, $("heat").height);
    $("heat").dataset.index = "";
    $("character").textContent = attention
      ? "Point at a character to see where the model looked." : "This model has no attention to show.";
    return;
  }
  const [character, confidence] = reading.characters[index];
  $("text").children[index].classList.add("chosen");
  const name = { "\n": "end of line", " ": "space" }[character] ?? `“${character}”`;
  $("character").textContent =
    `${name}: ${percent(confidence)} sure (${index + 1} of ${reading.characters.length})`;
  if (attention) drawHeat(heat, index);
}

function drawHeat(heat, index) {
  // a pixel for each cell, stretched over the page; cells reach beyond its right and lower edges
  const [rows, columns] = reading.grid, [height, width] = reading.size;
  const cells = new ImageData(columns, rows);
  const first = index * rows * columns;
  for (let cell = 0; cell < rows * columns; cell++) {
    const weight = attention[first + cell];
    cells.data.set([255, 90, 0, Math.min(255, weight)], 4 * cell);
  }
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(cells, 0, 0);
  const canvas = $("heat");
  canvas.width = 2 * width;
  canvas.height = 2 * height;
  heat.imageSmoothingEnabled = true;
  heat.drawImage(small, 0, 0, 2 * columns * reading.cell[1], 2 * rows * reading.cell[0]);
  canvas.dataset.index = index;
}

$("text").addEventListener("mouseover", (event) => {
  const index = event.target.dataset.index;
  if (index !== undefined) { stop(); choose(Number(index)); }
});
$("text").addEventListener("mouseleave", () => { if (!playing) choose(-1); });
$("text").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step === undefined || !reading) return;
  event.preventDefault();
  stop();
  choose(Math.max(0, Math.min(reading.characters.length - 1, chosen + step)));
});

function stop() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Watch it read";
}
$("play").addEventListener("click", () => {
  if (playing) { stop(); return; }
  let index = 0;
  $("play").textContent = "Stop";
  playing = setInterval(() => {
    if (index < reading.characters.length) choose(index++);
    else { stop(); choose(-1); }
  }, 80);
});

// --- corrections -----------------------------------------------------------------------------

function toBase64(bytes) {
  let text = "";
  const view = new Uint8Array(bytes);
  for (let at = 0; at < view.length; at += 32768) {
    text += String.fromCharCode(...view.subarray(at, at + 32768));
  }
  return btoa(text);
}

$("correct").addEventListener("submit", async (event) => {
  event.preventDefault();
  const told = $("saved"), mine = number;
  try {
    const body = JSON.stringify({ image: toBase64(image), text: $("correction").value });
    const kept = await ask("/mistake", {
      method: "POST", body, headers: { "content-type": "application/json" },
    });
    if (mine !== number) return;
    told.classList.remove("bad");
    told.textContent = `Kept as ${kept.saved}. Train on all of them with ${kept.train}`
      + (kept.lacking ? `, and vocabulary=from_data, for this model cannot write ${kept.lacking}.` : ".");
  } catch (error) {
    told.classList.add("bad");
    told.textContent = error.message;
  }
});
$("copy").addEventListener("click", () => navigator.clipboard.writeText($("correction").value));

ask("/about").then((found) => {
  about = found;
  $("model").textContent = found.title;
  preparePad(found.canvas);
  showExamples(found.examples);
}).catch((error) => say(error.message, true));
