"use strict"

const DATA = JSON.parse(document.getElementById("data").textContent)
const ALL = -1
const LAYERS = DATA.layers.length, HEADS = DATA.heads.length
const IMAGE = DATA.shares.indexOf("image")
const FINE = 360 // pixels of the longer side of a drawn map

const $ = id => document.getElementById(id)
const percent = share => (100 * share).toPrecision(share < 0.1 ? 2 : 3).replace(/^(\d{3})\.0$/, "$1") + "%"
const round = share => Math.round(100 * share) + "%"
const many = (count, what) => count + " " + what + (count === 1 ? "" : "s")

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...children)
  return element
}

// ---- numbers -----------------------------------------------------------------------------------------

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length)
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i)
  return found
}
const floats = text => new Float32Array(bytes(text).buffer)
const range = (chosen, count) => chosen === ALL ? [...Array(count).keys()] : [chosen]
const place = (word, layer, head) => (word * LAYERS + layer) * HEADS + head

/** Of every word, layer and head `n` numbers. */
class Table {
  constructor(values, n) { this.values = values; this.n = n }

  value(i) { return this.values[i] }

  factor() { return 1 }

  mean(word, layer, head) {
    const sum = new Float32Array(this.n), layers = range(layer, LAYERS), heads = range(head, HEADS)
    for (const l of layers) {
      for (const h of heads) {
        const at = place(word, l, h), factor = this.factor(at) / (layers.length * heads.length)
        for (let i = 0, from = at * this.n; i < this.n; i++) sum[i] += this.value(from + i) * factor
      }
    }
    return sum
  }
}

const SQUARES = Float32Array.from({length: 256}, (_, i) => (i / 255) ** 2)

/** In squares of 255 steps of the largest of every `n`. */
class Packed extends Table {
  constructor({steps, tops}) {
    const values = bytes(steps), largest = floats(tops)
    super(values, values.length / largest.length)
    this.tops = largest
  }

  value(i) { return SQUARES[this.values[i]] }

  factor(at) { return this.tops[at] }
}

/** Of every word, layer and head, or of all heads alike, a bit for each of `n` places. */
class Bits {
  constructor({alike, bits}, n) { this.bits = bytes(bits); this.heads = alike ? 1 : HEADS; this.n = n }

  /** Where all of them are set. */
  all(word, layer, head) {
    const found = new Uint8Array(this.n).fill(1)
    for (const l of range(layer, LAYERS)) {
      for (const h of this.heads === 1 ? [0] : range(head, HEADS)) {
        const from = ((word * LAYERS + l) * this.heads + h) * this.n
        for (let i = 0, at = from; i < this.n; i++, at++) found[i] &= this.bits[at >> 3] >> (7 - (at & 7))
      }
    }
    return found
  }
}

const runs = DATA.runs.map(told => ({
  ...told,
  maps: told.maps.map(map => new Packed(map)),
  gone: told.gone.map((gone, p) => gone && new Bits(gone, DATA.pictures[p].rows * DATA.pictures[p].columns)),
  onto: new Packed(told.onto),
  shares: new Table(floats(told.shares), DATA.shares.length),
}))

/** For every point of a finer axis the cells around it, and how far it is between their middles. */
function axis(count, size) {
  const low = new Int32Array(size), high = new Int32Array(size), between = new Float32Array(size)
  for (let i = 0; i < size; i++) {
    const at = Math.min(Math.max((i + 0.5) * count / size - 0.5, 0), count - 1)
    low[i] = Math.floor(at)
    high[i] = Math.min(low[i] + 1, count - 1)
    between[i] = at - low[i]
  }
  return {low, high, between}
}

/** Without steps: (height, width) from (rows, columns). */
function enlarged(heat, rows, columns, width, height) {
  const found = new Float32Array(width * height), x = axis(columns, width), y = axis(rows, height)
  for (let j = 0, i = 0; j < height; j++) {
    const above = y.low[j] * columns, below = y.high[j] * columns, v = y.between[j]
    for (let k = 0; k < width; k++, i++) {
      const left = x.low[k], right = x.high[k], u = x.between[k]
      const upper = heat[above + left] + (heat[above + right] - heat[above + left]) * u
      found[i] = upper + (heat[below + left] + (heat[below + right] - heat[below + left]) * u - upper) * v
    }
  }
  return found
}

// ---- colours -----------------------------------------------------------------------------------------

/** 256 colours, each as the four bytes of a pixel. */
function shades(colour) {
  const parts = Array.from({length: 256}, (_, i) => colour(i))
  return new Uint32Array(Uint8Array.from(parts.flat()).buffer)
}
const VEIL = shades(i => DATA.colours[i])
const OPAQUE = shades(i => [...DATA.colours[i].slice(0, 3), 255])
const LESS = [64, 156, 255], MORE = [255, 138, 36]
const CHANGE = shades(i => [...(i < 128 ? LESS : MORE), 245 * Math.abs(i / 127.5 - 1) ** 1.2])

function gradient(table) {
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map(i => {
    const [r, g, b, a] = new Uint8Array(table.buffer, 4 * i, 4)
    return `rgb(${r} ${g} ${b} / ${a / 255})`
  })
  return `linear-gradient(90deg, ${stops})`
}

/** Numbers from `low` to `high` in the colours of a table. */
function paint(canvas, numbers, low, high, table) {
  const image = new ImageData(canvas.width, canvas.height), pixels = new Uint32Array(image.data.buffer)
  const scale = high > low ? 255 / (high - low) : 0
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[Math.min(255, ((numbers[i] - low) * scale + 0.5) | 0)]
  canvas.getContext("2d").putImageData(image, 0, 0)
}

const HATCH = (() => {
  const tile = make("canvas", {width: 9, height: 9}), pen = tile.getContext("2d")
  pen.fillStyle = "rgb(62 62 70 / .85)"
  pen.fillRect(0, 0, 9, 9)
  pen.strokeStyle = "rgb(185 185 195)"
  for (const from of [0, 9, 18]) {
    pen.moveTo(from, 0)
    pen.lineTo(from - 9, 9)
  }
  pen.stroke()
  return pen.createPattern(tile, "repeat")
})()

/** Places that are gone, over what was painted. */
function strike(canvas, gone, fill) {
  const {rows, columns} = DATA.pictures[state.picture], pen = canvas.getContext("2d")
  const wide = canvas.width / columns, high = canvas.height / rows
  pen.beginPath()
  gone.forEach((out, i) => { if (out) pen.rect((i % columns) * wide, Math.floor(i / columns) * high, wide, high) })
  pen.fillStyle = fill
  pen.fill()
}

// ---- what is chosen ----------------------------------------------------------------------------------

const state = {run: 0, word: DATA.start, layer: ALL, head: ALL, picture: 0}
let pointed = null // the word under the pointer, which is shown as long as it is there

const shown = () => pointed ?? state
const wordIn = run => shown().run === run ? shown().word : DATA.partners[shown().run][shown().word]
const named = run => runs[run].stack || (runs.length > 1 ? "without methods" : "")
const quoted = (run, word) => word === 0 ? "the whole answer" : `“${runs[run].words[word].text}”`
const meanOr = (name, at, labels) => at === ALL ? `mean of ${many(labels.length, name)}` : `${name} ${labels[at]}`
const chosenHead = () => DATA.merged ? "mean of all heads" : meanOr("head", state.head, DATA.heads)
const chosen = () => `${meanOr("layer", state.layer, DATA.layers)}, ${chosenHead()}`

function choose(changed) {
  Object.assign(state, changed)
  pointed = null
  render()
}

function point(word) {
  pointed = word
  render()
}

// ---- words -------------------------------------------------------------------------------------------

const chips = []
const wordGroup = make("div", {role: "radiogroup", "aria-label": "Show where it looked for"})
$("words").append(wordGroup)
runs.forEach((run, r) => {
  const lines = r === 0 ? [false, true] : [true]
  for (const said of lines) {
    const line = make("div", {class: said ? "line" : "line asked"})
    if (said && runs.length > 1) line.append(make("b", {}, named(r)))
    run.words.forEach((word, w) => {
      if (word.said !== said) return
      const chip = make("button", {type: "button", role: "radio", class: w === 0 ? "word whole" : "word"}, word.text)
      chip.onclick = () => choose({run: r, word: w})
      chip.onpointerenter = event => { if (event.pointerType === "mouse") point({run: r, word: w}) }
      chip.onpointerleave = () => { if (pointed) point(null) }
      chips.push({run: r, word: w, element: chip})
      line.append(chip)
    })
    if (line.children.length) wordGroup.append(line)
  }
})

function step(by) {
  const now = chips.findIndex(chip => chip.run === state.run && chip.word === state.word)
  const next = chips[(now + by + chips.length) % chips.length]
  choose({run: next.run, word: next.word})
  next.element.focus()
}

function drawWords() {
  const now = shown(), {layer, head} = state
  const onto = runs.map((run, r) => wordIn(r) == null ? null : run.onto.mean(wordIn(r), layer, head))
  const top = Math.max(...onto.flatMap((row, r) => row ? [...row.slice(0, runs[r].words.length - 1)] : []), 1e-9)
  for (const {run, word, element} of chips) {
    const checked = run === state.run && word === state.word
    const row = onto[run === 0 && !runs[0].words[word].said ? now.run : run]
    element.setAttribute("aria-checked", checked)
    element.tabIndex = checked ? 0 : -1
    element.classList.toggle("shown", wordIn(run) === word)
    element.style.setProperty("--onto", word > 0 && row ? (row[word - 1] / top).toFixed(2) : 0)
  }
}

// ---- pictures ----------------------------------------------------------------------------------------

const stages = [...runs.keys(), ...(runs.length > 1 ? ["difference"] : [])].map(what => {
  const difference = what === "difference", part = name => make("span", {class: name})
  const stage = {what, difference, heat: null, gone: null, image: make("img"), canvas: make("canvas", {role: "img"})}
  for (const name of ["low", "scale", "high", "removed", "here"]) stage[name] = part(name)
  stage.box = make("div", {class: difference ? "stage difference" : "stage"}, stage.image, stage.canvas)
  const title = runs.length > 1 ? [make("strong", {}, difference ? "Difference" : named(what))] : []
  const caption = make("figcaption", {}, ...title, stage.low, stage.scale, stage.high, stage.removed, stage.here)
  $("stages").append(make("figure", {}, stage.box, caption))
  stage.scale.style.background = gradient(difference ? CHANGE : OPAQUE)
  stage.box.onpointermove = event => {
    const {rows, columns} = DATA.pictures[state.picture], area = stage.box.getBoundingClientRect()
    const at = (from, size, count) => Math.min(count - 1, Math.max(0, Math.floor((from / size) * count)))
    const x = at(event.clientX - area.left, area.width, columns), y = at(event.clientY - area.top, area.height, rows)
    const i = y * columns + x, here = stage.gone?.[i] ? "here removed" : stage.heat && `here ${percent(stage.heat[i])}`
    stage.here.textContent = here || ""
  }
  stage.box.onpointerleave = () => { stage.here.textContent = "" }
  return stage
})
$("view").classList.toggle("pair", runs.length > 1)
document.body.classList.toggle("pair", runs.length > 1)
document.body.classList.toggle("many", LAYERS > 12)
document.body.classList.add("heat")

const strip = DATA.pictures.length < 2 ? [] : DATA.pictures.map((picture, p) => {
  const share = make("span")
  const button = make("button", {type: "button"}, make("img", {src: picture.source, alt: ""}), share)
  button.onclick = () => { state.picture = p; hang() }
  $("strip").append(button)
  return {button, share}
})

/** Put the chosen picture on every stage. */
function hang() {
  const {source, width, height} = DATA.pictures[state.picture], scale = FINE / Math.max(width, height)
  for (const {image, canvas} of stages) {
    image.src = source
    image.alt = `Picture ${state.picture + 1} of ${DATA.pictures.length}`
    image.width = canvas.width = Math.max(1, Math.round(width * scale))
    image.height = canvas.height = Math.max(1, Math.round(height * scale))
    image.classList.toggle("small", Math.max(width, height) < 200)
  }
  const {columns, rows} = DATA.pictures[state.picture]
  for (const {canvas} of tiles) Object.assign(canvas, {width: columns, height: rows})
  render()
}

/** The largest value of a map that no sink has, for sinks would leave the rest dark. */
function largest(heat, run, layer) {
  const {rows, columns} = DATA.pictures[state.picture], taken = new Set()
  for (const {picture, box} of sinksIn(run, layer)) {
    if (picture !== state.picture) continue
    for (let y = Math.round(box[1] * rows); y < Math.round(box[3] * rows); y++) {
      for (let x = Math.round(box[0] * columns); x < Math.round(box[2] * columns); x++) taken.add(y * columns + x)
    }
  }
  const most = (some, value, i) => taken.has(i) ? some : Math.max(some, value)
  return heat.reduce(most, 0) || Math.max(...heat)
}

function drawPictures() {
  const {layer, head, picture} = state
  const heats = runs.map((run, r) => wordIn(r) == null ? null : run.maps[picture].mean(wordIn(r), layer, head))
  const top = Math.max(...heats.map((heat, r) => heat ? largest(heat, r, layer) : 0))
  for (const stage of stages) {
    if (!stage.difference) {
      drawHeat(stage, heats[stage.what], top)
      drawGone(stage, heats[stage.what] && runs[stage.what].gone[picture])
    }
    else drawChange(stage, heats.every(heat => heat) ? heats[1].map((value, i) => value - heats[0][i]) : null)
  }
  strip.forEach(({button, share}, p) => {
    const map = runs[shown().run].maps[p].mean(shown().word, layer, head)
    share.textContent = round(map.reduce((a, b) => a + b, 0))
    button.setAttribute("aria-pressed", p === picture)
    button.setAttribute("aria-label", `Picture ${p + 1}: ${share.textContent} of attention`)
  })
}

function drawHeat(stage, heat, top) {
  if (!heat) return drawNothing(stage, `does not say ${quoted(shown().run, shown().word)}`)
  const mark = heat.some(value => value > top) ? "≥ " : ""
  drawStage(stage, heat, heat.map(value => Math.min(value, top)), 0, top, VEIL)
  tellScale(stage, "0", `${mark}${percent(top)} per token`, `Heat: ${described(heat, stage.what)}`)
}

function drawGone(stage, bits) {
  stage.gone = bits ? bits.all(wordIn(stage.what), state.layer, state.head) : null
  const count = stage.gone ? stage.gone.reduce((a, b) => a + b, 0) : 0
  if (count) strike(stage.canvas, stage.gone, HATCH)
  stage.removed.textContent = count ? `hatched: ${count} of ${stage.gone.length} places were removed` : ""
}

function drawChange(stage, change) {
  if (!change) return drawNothing(stage, "nothing to compare")
  const top = Math.max(...change.map(Math.abs))
  drawStage(stage, change, change, -top, top, CHANGE)
  tellScale(stage, `−${percent(top)}`, `+${percent(top)} per token`, "Where attention rose and fell")
}

function drawNothing(stage, why) {
  stage.canvas.getContext("2d").clearRect(0, 0, stage.canvas.width, stage.canvas.height)
  stage.heat = null
  tellScale(stage, why, "", why)
}

function drawStage(stage, heat, level, low, high, table) {
  const {rows, columns} = DATA.pictures[state.picture], {width, height} = stage.canvas
  stage.heat = heat
  paint(stage.canvas, enlarged(level, rows, columns, width, height), low, high, table)
}

function tellScale(stage, low, high, label) {
  stage.low.textContent = low
  stage.high.textContent = high
  stage.scale.hidden = !stage.heat
  stage.box.classList.toggle("nothing", !stage.heat)
  stage.canvas.setAttribute("aria-label", label)
}

/** Where the most of a map lies, beside sinks. */
function described(heat, run) {
  const {rows, columns} = DATA.pictures[state.picture], at = heat.indexOf(largest(heat, run, state.layer))
  const third = (i, count, names) => names[Math.min(2, Math.floor((3 * (i + 0.5)) / count))]
  const down = third(Math.floor(at / columns), rows, ["top", "", "bottom"])
  const across = third(at % columns, columns, ["left", "", "right"])
  return down || across ? `most at the ${[down, across].filter(Boolean).join(" ")}` : "most in the middle"
}

function tell() {
  const {run, word} = shown(), start = word === 0 ? "In " : runs[run].words[word].said ? "To say " : "Reading "
  const parts = [start, make("strong", {}, quoted(run, word)), ...(runs.length > 1 ? compared() : given(run, word))]
  $("told").replaceChildren(...parts, ` (${chosen()}).`)
}

function given(run, word) {
  const shares = runs[run].shares.mean(word, state.layer, state.head), pictures = DATA.pictures.length
  const of = name => round(shares[DATA.shares.indexOf(name)])
  const where = `its attention to the ${pictures > 1 ? "pictures" : "picture"}, ${described(stages[0].heat, run)}`
  const rest = `${of("question")} to the question and ${of("answer")} to its own answer`
  return [" it gave ", make("strong", {}, of("image")), ` of ${where}; ${rest}`]
}

function compared() {
  const each = runs.map((run, r) => {
    if (wordIn(r) == null) return `${named(r)} does not say it`
    const on = run.shares.mean(wordIn(r), state.layer, state.head)[IMAGE]
    return `${round(on)} of the attention is on the picture ${run.stack ? "with " : ""}${named(r)}`
  })
  return [`: ${each.join("; ")}`]
}

// ---- faithfulness ------------------------------------------------------------------------------------

const ORDERS = {map: "brightest first", random: "random order", reversed: "faintest first"}
const faith = runs.map(() => {
  const told = make("p"), chart = make("div", {class: "chart", role: "img"})
  $("faith").append(make("div", {}, told, chart))
  return {told, chart}
})
const gain = one => {
  const by = one.areas.random - one.areas.map
  return (by < 0 ? "−" : "+") + Math.abs(by).toFixed(2)
}

function drawFaith() {
  runs.forEach((run, r) => {
    const word = wordIn(r), {told, chart} = faith[r]
    const own = run.faithfulness.find(one => one.words.includes(word)), start = runs.length > 1 ? [make("b", {}, named(r)), " "] : []
    chart.hidden = !own
    if (!own) {
      const others = run.faithfulness.map(one => `${gain(one)} for ${quoted(r, one.words[0])}`)
      told.replaceChildren(...start, `Not measured for this word${others.length ? `; ${others.join(", ")}` : ""}.`)
      return
    }
    const p = own.curves.map[0], areas = Object.entries(ORDERS).map(([name, what]) => `${round(own.areas[name])} ${what}`)
    const what = `The probability of ${quoted(r, word)} is ${round(p[0])}${word === 0 ? " a token" : ""}`
    const falls = `While places are removed, its mean is ${areas.join(", ")}; it ends at ${round(p.at(-1))}`
    const beaten = `The map, of all layers and heads, beats ${own.beaten} of ${many(own.curves.random.length, "random order")}`
    told.replaceChildren(...start, make("strong", {}, gain(own)), ` ${what}. ${falls}. ${beaten}.`)
    chart.innerHTML = plotted(own)
    chart.setAttribute("aria-label", `Its probability while places are removed: ${areas.join(", ")}`)
  })
}

/** Deletion curves, numbers only. */
function plotted({removed, curves}) {
  const point = (share, p) => `${(30 + 290 * share).toFixed(1)},${(104 - 96 * p).toFixed(1)}`
  const line = (name, run) => `<polyline class="${name}" points="${run.map((p, i) => point(removed[i], p)).join(" ")}"/>`
  const lines = ["random", "reversed", "map"].flatMap(name => curves[name].map(run => line(name, run)))
  const keys = Object.keys(ORDERS).map((name, i) =>
    `<polyline class="${name}" points="${40 + 96 * i},135 ${58 + 96 * i},135"/>` +
    `<text x="${62 + 96 * i}" y="138.5">${ORDERS[name]}</text>`)
  return `<svg viewBox="0 0 330 144"><path d="M30 8V104H320"/><text x="0" y="12">100%</text>` +
    `<text x="12" y="107">0%</text><text x="30" y="119">0%</text><text x="320" y="119" text-anchor="end">` +
    `100% of the places removed</text>${lines.join("")}${keys.join("")}</svg>`
}

// ---- layers and heads --------------------------------------------------------------------------------

for (const [name, count, labels] of [["layer", LAYERS, DATA.layers], ["head", HEADS, DATA.heads]]) {
  const input = $(name)
  Object.assign(input, {min: ALL, max: count - 1, value: ALL, disabled: count === 1})
  input.oninput = () => choose({[name]: Number(input.value)})
  input.tell = () => {
    const merged = name === "head" && DATA.merged
    const all = merged ? "mean of all" : count === 1 ? labels[0] : `mean of all ${count}`
    input.value = state[name]
    $(`${name}-told`).textContent = state[name] === ALL ? all : `${labels[state[name]]}`
    input.setAttribute("aria-valuetext", $(`${name}-told`).textContent)
  }
}
$("heat").onclick = () => $("heat").setAttribute("aria-pressed", document.body.classList.toggle("heat"))

/** One stop for Tab, and arrows inside. */
function roving(group, buttons) {
  buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0 })
  group.addEventListener("focusin", event => {
    for (const button of buttons) button.tabIndex = button === event.target ? 0 : -1
  })
  group.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key]
    const at = buttons.indexOf(event.target)
    if (!by || at < 0) return
    event.preventDefault()
    buttons[Math.min(buttons.length - 1, Math.max(0, at + by))].focus()
  })
}

const legend = DATA.shares.map(name => {
  const told = make("span")
  $("legend").append(make("li", {}, make("i", {class: name}), told))
  return told
})
const rows = DATA.layers.map((label, layer) => {
  const bars = runs.map(() => make("span", {class: "bar"}, ...DATA.shares.map(name => make("span", {class: name}))))
  const told = make("span"), all = make("span", {class: "bars"}, ...bars)
  const button = make("button", {type: "button"}, make("span", {}, String(label)), all, told)
  button.onclick = () => choose({layer: state.layer === layer ? ALL : layer})
  $("shares").append(button)
  return {button, bars, told}
})
roving($("shares"), rows.map(row => row.button))

function drawShares() {
  const own = shown().run
  rows.forEach(({button, bars, told}, layer) => {
    const label = [`Layer ${DATA.layers[layer]}`]
    runs.forEach((run, r) => {
      const word = wordIn(r), shares = word == null ? null : run.shares.mean(word, layer, state.head)
      DATA.shares.forEach((_, i) => { bars[r].children[i].style.width = shares ? `${100 * shares[i]}%` : 0 })
      const each = shares && DATA.shares.map((name, i) => `${name} ${round(shares[i])}`).join(", ")
      if (each) label.push(`${named(r)} ${each}`.trim())
      if (r === own) told.textContent = round(shares[IMAGE])
    })
    button.setAttribute("aria-label", label.join(": "))
    button.setAttribute("aria-pressed", state.layer === layer)
  })
  const shares = runs[own].shares.mean(wordIn(own), state.layer, state.head)
  legend.forEach((told, i) => { told.textContent = `${DATA.shares[i]} ${round(shares[i])}` })
}

// ---- sinks -------------------------------------------------------------------------------------------

function drawSinks() {
  for (const mark of document.querySelectorAll(".mark")) mark.remove()
  for (const {element} of chips) element.classList.remove("sink")
  const where = state.layer === ALL ? "in any layer" : `in layer ${DATA.layers[state.layer]}`
  const told = runs.map((run, r) => {
    if (!run.sinks) return "Sinks are not known, for the rows of the question were not recorded."
    const found = sinksIn(r, state.layer)
    if (!found.length) return `No token is a sink ${where}.`
    const onto = wordIn(r) == null ? null : run.onto.mean(wordIn(r), state.layer, state.head)
    if (onto) found.sort((a, b) => onto[b.onto] - onto[a.onto])
    for (const sink of found) mark(r, sink)
    const each = found.slice(0, 6).map(sink => sink.text + (onto ? ` (${percent(onto[sink.onto])})` : ""))
    const rest = found.length > each.length ? ` and ${found.length - each.length} more` : ""
    return `Sinks ${where}, which draw attention whatever is asked: ${each.join(", ")}${rest}.`
  })
  const same = told.every(text => text === told[0])
  $("sinks").textContent = same ? told[0] : told.map((text, r) => `${named(r)}: ${text}`).join(" ")
}

/** Those of a layer, or of any. */
function sinksIn(run, layer) {
  const {sinks, words} = runs[run]
  if (!sinks) return []
  const found = new Set(range(layer, LAYERS).flatMap(l => sinks.layers[l]))
  return [...found].map(sink => ({...sinks.tokens[sink], onto: words.length - 1 + sink}))
}

/** Where a token stands: a word, or a place on the picture. */
function mark(run, {words, picture, box}) {
  for (const chip of chips) if (chip.run === run && words.includes(chip.word)) chip.element.classList.add("sink")
  if (picture !== state.picture) return
  const [left, top, right, bottom] = box, frame = make("span", {class: "mark", title: "a sink"})
  const sides = {left, top, width: right - left, height: bottom - top}
  for (const [side, share] of Object.entries(sides)) frame.style[side] = `${100 * share}%`
  stages[run].box.append(frame)
}

// ---- all heads ---------------------------------------------------------------------------------------

const lazy = document.body.classList.contains("many")
const tiles = Array.from({length: LAYERS * HEADS}, () => {
  const tile = {canvas: make("canvas"), label: make("span"), share: make("b"), near: !lazy, told: ""}
  tile.button = make("button", {type: "button"}, tile.canvas, tile.share, tile.label)
  tile.button.onclick = () => {
    const same = state.layer === tile.layer && state.head === tile.head
    choose(same ? {layer: ALL, head: ALL} : {layer: tile.layer, head: tile.head})
  }
  $("tiles").append(tile.button)
  return tile
})
const tileOf = new Map(tiles.map(tile => [tile.button, tile]))
roving($("tiles"), tiles.map(tile => tile.button))

function drawTile(tile) {
  const {run, word} = shown(), map = runs[run].maps[state.picture], i = place(word, tile.layer, tile.head)
  const told = [run, word, i, state.picture].join()
  if (!tile.near || tile.told === told) return
  const share = runs[run].shares.values[i * DATA.shares.length + IMAGE]
  const heat = map.mean(word, tile.layer, tile.head)
  paint(tile.canvas, heat, 0, largest(heat, run, tile.layer), OPAQUE)
  const gone = runs[run].gone[state.picture]
  if (gone) strike(tile.canvas, gone.all(word, tile.layer, tile.head), "rgb(98 98 106)")
  const layer = DATA.layers[tile.layer], head = DATA.heads[tile.head]
  const name = DATA.merged ? `Layer ${layer}` : `Layer ${layer}, head ${head}`
  tile.label.textContent = DATA.merged ? `L${layer}` : `L${layer} H${head}`
  tile.share.textContent = round(share)
  tile.button.setAttribute("aria-label", `${name}: ${round(share)} on the picture`)
  tile.told = told
}

/** Those first that look at the picture most; where there are many, only those in sight are drawn. */
function drawTiles() {
  const {run, word} = shown(), from = place(word, 0, 0), values = runs[run].shares.values
  const share = i => values[(from + i) * DATA.shares.length + IMAGE]
  const order = tiles.map((_, i) => i).sort((a, b) => share(b) - share(a))
  $("heads-of").textContent = ["by how much they look at the picture", named(run)].filter(Boolean).join(", ")
  tiles.forEach((tile, rank) => {
    tile.layer = Math.floor(order[rank] / HEADS)
    tile.head = order[rank] % HEADS
    const pressed = String(tile.layer === state.layer && tile.head === state.head)
    if (tile.button.ariaPressed !== pressed) tile.button.ariaPressed = pressed
    drawTile(tile)
  })
}

const sight = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    tileOf.get(target).near = isIntersecting
    drawTile(tileOf.get(target))
  }
}, {rootMargin: "800px"})
if (lazy) for (const {button} of tiles) sight.observe(button)

// ---- all of it ---------------------------------------------------------------------------------------

let waiting = 0

/** The new map at once; the small ones in the frame after it. */
function render() {
  drawWords()
  drawPictures()
  tell()
  $("layer").tell()
  $("head").tell()
  drawShares()
  drawSinks()
  drawFaith()
  cancelAnimationFrame(waiting)
  waiting = requestAnimationFrame(() => setTimeout(drawTiles))
}

function turn(name, count, by) {
  const at = state[name] + by
  choose({[name]: at < ALL ? count - 1 : at >= count ? ALL : at})
}

document.addEventListener("keydown", event => {
  const own = event.target.closest("input, #shares, #tiles, #strip")
  if (own || event.ctrlKey || event.metaKey || event.altKey) return
  const across = {ArrowRight: 1, ArrowLeft: -1}[event.key]
  const up = {ArrowUp: 1, ArrowDown: -1}[event.key]
  if (!across && !(up && event.target.closest(".word"))) return
  event.preventDefault()
  if (across) step(across)
  else if (event.shiftKey) turn("head", HEADS, up)
  else turn("layer", LAYERS, up)
})

hang()
chips.find(chip => chip.run === state.run && chip.word === state.word).element.focus({preventScroll: true})
