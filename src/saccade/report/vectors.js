"use strict"

const DATA = JSON.parse(document.getElementById("data").textContent)
const HEADS = DATA.heads[0].length, TOKENS = DATA.tokens, QUERY = 0, KEY = 1
const SMALL = 96 // pixels of a side of a head's small picture
const NEAR = 12 // pixels within which a point is clicked

const $ = id => document.getElementById(id)
const percent = share => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%"

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...children)
  return element
}

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length)
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i)
  return found
}

// Of every head its queries, then its keys, each with x and y between -1 and 1.
const places = new Int16Array(bytes(DATA.places).buffer)
const norms = new Float32Array(bytes(DATA.norms).buffer)
const inputs = DATA.inputs.map(told => ({...told, weights: bytes(told.weights), size: told.kinds.length}))
let first = 0
for (const input of inputs) {
  input.first = first
  first += input.size
}
const inputOf = inputs.flatMap((input, i) => Array(input.size).fill(i))
const positionOf = inputs.flatMap(input => input.kinds.map((_, i) => i))
const longest = Math.max(...inputs.map(input => input.size))
const kinds = [...new Set(inputs.flatMap(input => input.kinds))]

const state = {head: 0, colour: "type", input: 0, token: 0, side: QUERY}

const point = (head, side, token) => (head * 2 + side) * TOKENS + token
const place = (head, side, token) => [0, 1].map(axis => places[2 * point(head, side, token) + axis] / 32767)
function nameOf(head) {
  const layer = Math.floor(head / HEADS)
  return `${DATA.sites[layer]}, head ${DATA.heads[layer][head % HEADS]}`
}

/** What each token of the input gets of the chosen one's attention, or gives to it. */
function attention() {
  const {size, weights} = inputs[state.input], from = state.head * size * size
  return Array.from({length: size}, (_, other) => {
    const [row, column] = state.side === QUERY ? [state.token, other] : [other, state.token]
    return (weights[from + row * size + column] / 255) ** 2
  })
}

// ---- colours -------------------------------------------------------------------------------------------

const ramp = share => `hsl(${Math.round(225 - 205 * share)} 72% 52%)`
const apart = (i, count) => `hsl(${Math.round(360 * i / count)} 62% 52%)`
const shade = document.createElement("i") // turns a colour of the page's theme into one that a canvas knows
document.body.append(shade)

function theme(name) {
  shade.style.color = `var(${name})`
  return getComputedStyle(shade).color
}

function colours() {
  const sides = [theme("--query"), theme("--key")]
  const from = 2 * state.head * TOKENS, own = norms.subarray(from, from + 2 * TOKENS)
  const [least, most] = own.reduce(([low, high], n) => [Math.min(low, n), Math.max(high, n)], [Infinity, -Infinity])
  return {
    type: {of: side => sides[side], legend: [["queries", sides[0]], ["keys", sides[1]]]},
    position: {
      of: (_, token) => ramp(positionOf[token] / Math.max(1, longest - 1)),
      legend: [["first", ramp(0)], ["last", ramp(1)]],
    },
    norm: {
      of: (side, token) => ramp(most > least ? (own[side * TOKENS + token] - least) / (most - least) : 0),
      legend: [[least.toPrecision(2), ramp(0)], [most.toPrecision(2), ramp(1)]],
    },
    kind: {
      of: (_, token) => apart(kinds.indexOf(inputs[inputOf[token]].kinds[positionOf[token]]), kinds.length),
      legend: kinds.map((kind, i) => [kind, apart(i, kinds.length)]),
    },
    input: {
      of: (_, token) => apart(inputOf[token], inputs.length),
      legend: inputs.slice(0, 12).map((input, i) => [input.name, apart(i, inputs.length)]),
    },
  }[state.colour]
}

// ---- clouds --------------------------------------------------------------------------------------------

const draws = canvas => canvas.getContext("2d")
const spot = (canvas, [x, y], edge) => {
  const half = Math.min(canvas.width, canvas.height) / 2 - edge
  return [canvas.width / 2 + half * x, canvas.height / 2 - half * y]
}

function mark(context, side, [x, y], radius) {
  context.beginPath()
  if (side === QUERY) context.rect(x - radius, y - radius, 2 * radius, 2 * radius)
  else context.arc(x, y, 1.15 * radius, 0, 2 * Math.PI)
}

function scatter(canvas, head, radius, of) {
  const context = draws(canvas)
  context.clearRect(0, 0, canvas.width, canvas.height)
  context.globalAlpha = 0.75
  for (const side of [KEY, QUERY]) {
    for (let token = 0; token < TOKENS; token++) {
      context.fillStyle = of(side, token)
      mark(context, side, spot(canvas, place(head, side, token), 3 * radius), radius)
      context.fill()
    }
  }
  context.globalAlpha = 1
}

function drawCloud() {
  const canvas = $("cloud"), ratio = devicePixelRatio, box = canvas.getBoundingClientRect()
  canvas.width = Math.round(box.width * ratio)
  canvas.height = Math.round(box.height * ratio)
  const {of, legend} = colours(), radius = (TOKENS > 400 ? 2 : 3.5) * ratio, edge = 3 * radius
  scatter(canvas, state.head, radius, of)
  const context = draws(canvas), input = inputs[state.input], given = attention()
  const own = spot(canvas, place(state.head, state.side, input.first + state.token), edge)
  context.strokeStyle = theme("--ink")
  context.lineWidth = 1.5 * ratio
  given.forEach((weight, other) => {
    if (weight < 0.02) return
    context.globalAlpha = weight
    context.beginPath()
    context.moveTo(...own)
    context.lineTo(...spot(canvas, place(state.head, 1 - state.side, input.first + other), edge))
    context.stroke()
  })
  context.globalAlpha = 1
  mark(context, state.side, own, 2.2 * radius)
  context.stroke()
  $("legend").replaceChildren(...legend.map(([name, colour], i) => {
    const swatch = make("i", {class: state.colour === "type" && i === KEY ? "round" : ""})
    swatch.style.background = colour
    return make("li", {}, swatch, name)
  }))
}

$("cloud").onclick = event => {
  const canvas = $("cloud"), ratio = devicePixelRatio, edge = 3 * (TOKENS > 400 ? 2 : 3.5) * ratio
  const at = [event.offsetX * ratio, event.offsetY * ratio]
  let best = null, least = NEAR * ratio
  for (const side of [QUERY, KEY]) {
    for (let token = 0; token < TOKENS; token++) {
      const [x, y] = spot(canvas, place(state.head, side, token), edge)
      const far = Math.hypot(x - at[0], y - at[1])
      if (far < least) [best, least] = [[side, token], far]
    }
  }
  if (best) choose({side: best[0], input: inputOf[best[1]], token: positionOf[best[1]]})
}

// ---- all heads -----------------------------------------------------------------------------------------

$("heads").style.gridTemplateColumns = `minmax(3rem, auto) repeat(${HEADS}, minmax(2.2rem, 1fr))`
const tiles = DATA.sites.flatMap((site, layer) => {
  $("heads").append(make("span", {class: "layer"}, site))
  return DATA.heads[layer].map((_, column) => {
    const head = layer * HEADS + column
    const canvas = make("canvas", {width: SMALL, height: SMALL})
    const button = make("button", {type: "button", role: "radio", "aria-label": nameOf(head)}, canvas)
    button.onclick = () => choose({head})
    $("heads").append(button)
    return {button, canvas}
  })
})

function drawHeads() {
  const sides = [theme("--query"), theme("--key")]
  tiles.forEach(({canvas}, head) => scatter(canvas, head, 1.2, side => sides[side]))
}

/** One stop for Tab; arrows move the choice. */
function roving(group, buttons, across, chosen, pick) {
  group.onkeydown = event => {
    const by = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across}[event.key]
    if (!by) return
    event.preventDefault()
    const next = chosen() + by
    if (next < 0 || next >= buttons().length) return
    pick(next)
    buttons()[next].focus()
  }
}
roving($("heads"), () => tiles.map(tile => tile.button), HEADS, () => state.head, head => choose({head}))
roving($("tokens"), () => [...$("tokens").children], 1, () => state.token, token => choose({token}))

// ---- attention -----------------------------------------------------------------------------------------

$("input").append(...inputs.map((input, i) => make("option", {value: i}, input.name)))
$("input").onchange = event => choose({input: Number(event.target.value), token: 0})
$("colour").onchange = event => choose({colour: event.target.value})
$("side").onchange = event => choose({side: Number(event.target.value)})
const label = (input, token) => input.texts[token]?.trim() || `${input.kinds[token]} ${token}`

let listed = null // the input whose tokens stand in the page

function drawTokens() {
  const input = inputs[state.input], given = attention(), most = Math.max(...given)
  if (listed !== state.input) {
    $("tokens").replaceChildren(...input.kinds.map((_, token) => {
      const button = make("button", {type: "button", role: "radio"}, label(input, token))
      button.onclick = () => choose({token})
      return button
    }))
    listed = state.input
  }
  const tint = state.side === QUERY ? "var(--key)" : "var(--query)"
  $("tokens").style.setProperty("--tint", tint)
  ;[...$("tokens").children].forEach((button, token) => {
    button.setAttribute("aria-checked", token === state.token)
    button.setAttribute("aria-label", `${label(input, token)}, ${percent(given[token])}`)
    button.tabIndex = token === state.token ? 0 : -1
    button.style.setProperty("--shade", most > 0 ? given[token] / most : 0)
  })
  const order = given.map((_, token) => token).sort((a, b) => given[b] - given[a]).slice(0, 3)
  const told = order.map(token => `${label(input, token)} (${percent(given[token])})`).join(", ")
  const verb = state.side === QUERY ? "attends most to" : "is attended to most by"
  $("attended").replaceChildren(make("strong", {}, label(input, state.token)), ` ${verb} ${told}.`)
  drawPicture(input, given, most, tint)
}

function drawPicture(input, given, most, tint) {
  $("picture").replaceChildren()
  if (!input.picture) return
  $("picture").style.setProperty("--tint", tint)
  $("picture").append(make("img", {src: input.picture, alt: input.name}))
  input.boxes.forEach((box, token) => {
    if (!box) return
    const cover = make("span", {class: token === state.token ? "own" : ""})
    const [left, top, right, bottom] = box
    const sides = {left, top, width: right - left, height: bottom - top}
    for (const [side, share] of Object.entries(sides)) cover.style[side] = `${100 * share}%`
    cover.style.setProperty("--shade", most > 0 ? given[token] / most : 0)
    $("picture").append(cover)
  })
}

// ---- all of it -----------------------------------------------------------------------------------------

function choose(changed) {
  Object.assign(state, changed)
  render()
}

function render() {
  tiles.forEach(({button}, head) => {
    button.setAttribute("aria-checked", head === state.head)
    button.tabIndex = head === state.head ? 0 : -1
  })
  const {scale, correlation} = DATA
  $("told").textContent = `${nameOf(state.head)}: c = ${scale[state.head].toPrecision(2)}, ` +
    `distance and dot product correlate by ${correlation[state.head].toFixed(2)}`
  $("cloud").setAttribute("aria-label", `Queries and keys of ${nameOf(state.head)}`)
  $("colour").value = state.colour
  $("input").value = state.input
  $("side").querySelectorAll("input")[state.side].checked = true
  drawCloud()
  drawTokens()
}

const redraw = () => {
  drawHeads()
  render()
}
addEventListener("resize", drawCloud)
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw)
redraw()
