// The browser's half of the player. It draws the frames that arrive, answers each one,
// and sends the whole set of held keys whenever that set changes.
const NAMES = { KeyP: 'pause', KeyR: 'reset' }
const PLAYED = /^(Key|Digit|Arrow|Space|Enter|Comma|Period|Slash|Page|Home|End|Backspace)/ // kept from the page, meant or not

function build(model, el) {
  const root = document.createElement('div')
  root.className = 'gg'
  root.innerHTML = `
    <div class="gg-stage">
      <canvas tabindex="0" role="img" data-lm-suppress-shortcuts="true" width="160" height="120"></canvas>
      <div class="gg-hint"><span>Click the picture to play</span></div>
    </div>
    <div class="gg-line"><span class="gg-status" role="status"></span><span class="gg-focus"></span></div>
    <div class="gg-meters">
      <div title="Frames drawn in this page during the last two seconds"><span class="gg-what">Frames/s</span><span class="gg-value" data-m="fps">–</span></div>
      <div title="From the key going down to the first frame that used it being on the page; median of the last 15"><span class="gg-what">Key → picture</span><span class="gg-value" data-m="latency">–</span></div>
      <div title="Time the engine took for one frame, and the time there is"><span class="gg-what">Engine</span><span class="gg-value" data-m="ms">–</span></div>
      <div title="Frames that were computed but not sent, because the page was late"><span class="gg-what">Dropped</span><span class="gg-value" data-m="dropped">0</span></div>
      <div title="What the engine was told for the frame you see" class="gg-wide"><span class="gg-what">Pressed</span><span class="gg-value" data-m="pressed">nothing</span></div>
    </div>
    <div class="gg-keys"></div>`
  el.appendChild(root)
  const one = s => root.querySelector(s)
  const meters = Object.fromEntries([...root.querySelectorAll('[data-m]')].map(d => [d.dataset.m, d]))
  return { root, canvas: one('canvas'), hint: one('.gg-hint'), status: one('.gg-status'), focus: one('.gg-focus'), keys: one('.gg-keys'), meters }
}

const median = xs => [...xs].sort((a, b) => a - b)[xs.length >> 1]

function render({ model, el }) {
  const id = Math.random().toString(36).slice(2, 10)
  const ui = build(model, el), { root, canvas, meters } = ui
  const ctx = canvas.getContext('2d', { willReadFrequently: true })
  const held = new Set(), pending = new Map(), drawn = [], latency = []
  let number = 0, codes = new Set(), chips = {}
  const send = m => model.send({ ...m, view: id })

  // ---- keys: the browser always tells the whole set, so a lost message cannot leave a key stuck
  const tell = t => { number += 1; if (t) pending.set(number, t); send({ type: 'keys', held: [...held], number }) }
  const release = () => { if (held.size) { held.clear(); tell() } }
  const leave = e => e.metaKey || e.altKey || (e.ctrlKey && /^(Key|Digit)/.test(e.code)) // Ctrl+W and friends stay the browser's
  function down(e) {
    if (e.code === 'Escape') { e.stopPropagation(); canvas.blur(); return }
    if (leave(e) || !(PLAYED.test(e.code) || codes.has(e.code))) return // Tab and F5 stay the browser's, too
    e.preventDefault(); e.stopPropagation() // else the page scrolls and the notebook takes the key for a shortcut
    const order = codes.has(e.code) ? null : NAMES[e.code]
    if (e.repeat || !(codes.has(e.code) || order)) return
    if (order) send({ type: 'do', what: order })
    else if (!held.has(e.code)) { held.add(e.code); tell(e.timeStamp) }
  }
  function up(e) {
    if (!held.delete(e.code)) return
    e.preventDefault(); e.stopPropagation(); tell()
  }
  function focused(on) {
    root.classList.toggle('gg-on', on)
    ui.focus.textContent = on ? 'Your keys go to the game; Esc releases them.' : 'Your keys stay in the notebook.'
    if (on) send({ type: 'focus' })
    else release()
  }
  const hidden = () => { if (document.hidden) { release(); send({ type: 'bye' }) } else send({ type: 'hello' }) }
  const point = () => { canvas.focus({ preventScroll: true }); send({ type: 'focus' }) }
  const onfocus = () => focused(true), onblur = () => focused(false)

  // ---- frames: raw RGBA, drawn at once and answered at once
  function frame(m, buffers) {
    if (m.type !== 'frame') return
    if (canvas.width !== m.w || canvas.height !== m.h) { canvas.width = m.w; canvas.height = m.h; size() }
    const b = buffers[0]
    ctx.putImageData(new ImageData(new Uint8ClampedArray(b.buffer, b.byteOffset, b.byteLength), m.w, m.h), 0, 0)
    send({ type: 'ack', n: m.n })
    requestAnimationFrame(() => { // the browser paints right after this
      const now = performance.now()
      drawn.push(now)
      if (m.view === id) for (const [n, t] of pending) if (n <= m.keys) {
        pending.delete(n)
        if (now - t < 3000) latency.push(now - t) // a key pressed in a pause says nothing
      }
      if (latency.length > 15) latency.splice(0, latency.length - 15)
    })
    const pressed = m.pressed.join(' + ')
    meters.pressed.textContent = pressed || 'nothing'
    meters.ms.textContent = `${m.ms.toFixed(1)} of ${m.period.toFixed(0)} ms`
    meters.dropped.textContent = m.dropped
    for (const [name, chip] of Object.entries(chips)) chip.classList.toggle('gg-down', m.pressed.includes(name))
    Object.assign(root.dataset, { n: m.n, step: m.step, keys: m.keys, pressed: m.pressed.join(' '), engine: m.engine })
  }
  function measure() {
    const now = performance.now()
    while (drawn.length && now - drawn[0] > 2000) drawn.shift()
    const live = drawn.length > 1 && now - drawn[drawn.length - 1] < 1000
    const fps = live ? 1000 * (drawn.length - 1) / (drawn[drawn.length - 1] - drawn[0]) : 0
    meters.fps.textContent = fps.toFixed(1)
    meters.latency.textContent = latency.length ? `${median(latency).toFixed(0)} ms` : 'press a key'
    Object.assign(root.dataset, { fps: fps.toFixed(2), latency: latency.map(x => x.toFixed(1)).join(' ') })
  }

  // ---- what the kernel says about itself
  const size = () => { canvas.style.width = `${canvas.width * Math.max(1, Math.min(model.get('scale'), Math.floor(1000 / canvas.width)))}px` }
  const status = () => { ui.status.textContent = model.get('status'); root.dataset.status = model.get('status') }
  function legend() {
    const rows = model.get('legend')
    codes = new Set(rows.flatMap(r => r.codes)); chips = {}
    ui.keys.replaceChildren(...[...rows, { name: 'Pause', keys: ['P'] }, { name: 'Reset', keys: ['R'] }].map(r => {
      const chip = document.createElement('span')
      chip.append(...r.keys.map(k => Object.assign(document.createElement('kbd'), { textContent: k })), ' ' + r.name.toLowerCase().replaceAll('_', ' '))
      if (r.codes) chips[r.name] = chip
      return chip
    }))
    canvas.setAttribute('aria-label', 'Game screen. Keys: ' + rows.map(r => `${r.keys.join(' or ')} for ${r.name}`).join(', '))
  }

  const listen = { keydown: down, keyup: up, focus: onfocus, blur: onblur, pointerdown: point }
  for (const [k, f] of Object.entries(listen)) canvas.addEventListener(k, f)
  document.addEventListener('visibilitychange', hidden)
  const watch = { 'msg:custom': frame, 'change:status': status, 'change:legend': legend, 'change:scale': size }
  for (const [k, f] of Object.entries(watch)) model.on(k, f)
  const timer = setInterval(measure, 400)
  legend(); status(); size(); ui.focus.textContent = 'Your keys stay in the notebook.'
  send({ type: 'hello' })
  return () => {
    clearInterval(timer)
    for (const [k, f] of Object.entries(watch)) model.off(k, f)
    document.removeEventListener('visibilitychange', hidden)
    send({ type: 'bye' })
  }
}

export default { render }
