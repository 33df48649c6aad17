"""The player in a real JupyterLab in a real Chromium: keys go in, pictures come out, and the pictures obey the keys.

Skipped without Chromium, except where `CI` is set: there it fails. `GAMENGEN_SHOTS` names a folder for the screenshot and the measured figures.
"""
import io, json, os, secrets, shutil, socket, subprocess, sys, time, urllib.request
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent/'nbs'/'10_player.ipynb'
BUSY = "import time\nend = time.time()+4\nwhile time.time()<end: sum(range(1000))\n'busy is over'"
ROOT = "document.querySelector('.gg')"

def missing(what):
    if os.getenv('CI'): pytest.fail(f'{what} is missing, and CI must not skip the browser test')
    pytest.skip(f'{what} is missing')

def chromium():
    for name in ('chromium', 'chromium-browser', 'google-chrome'):
        if path := shutil.which(name): return path
    if Path('/usr/bin/chromium').exists(): return '/usr/bin/chromium'
    missing('Chromium (apt-get install chromium)')

@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    folder = Path(os.getenv('GAMENGEN_SHOTS') or tmp_path_factory.mktemp('shots')); folder.mkdir(parents=True, exist_ok=True)
    return folder

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of this Python on a free port, with settings, kernels and notebooks of its own; yields the notebook's address."
    if sys.platform=='win32': pytest.skip('written for Linux and macOS')
    chromium(); folder = tmp_path_factory.mktemp('lab'); work = folder/'work'; work.mkdir()
    nb = nbformat.read(NOTEBOOK, 4); busy = nbformat.v4.new_code_cell(BUSY)
    first = next(i for i,c in enumerate(nb.cells) if c.cell_type=='code'); nb.cells.insert(first+1, busy)
    nbformat.write(nb, work/'player.ipynb')
    quiet = folder/'settings'/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
    env = {k:v for k,v in os.environ.items() if k not in ('IN_TEST', 'JPY_SESSION_NAME')}
    env |= {f'JUPYTER_{k}_DIR':str(folder/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    env |= dict(JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(folder/'spaces'), JUPYTER_NO_CONFIG='1')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16); url = f'http://127.0.0.1:{port}'
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
           f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={work}']
    with open(folder/'lab.log', 'w') as log: server = subprocess.Popen(cmd, env=env, cwd=work, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(900):
            try: urllib.request.urlopen(f'{url}/api/status?token={token}', timeout=2).close(); break
            except OSError: time.sleep(.1)
            assert server.poll() is None, (folder/'lab.log').read_text()[-3000:]
        else: pytest.fail('JupyterLab did not start in time:\n'+(folder/'lab.log').read_text()[-3000:])
        yield f'{url}/lab/tree/player.ipynb?token={token}'
    finally:
        server.terminate() # it ends its kernels
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill(); server.wait()

@pytest.fixture(scope='module')
def page(lab, shots):
    "The notebook with its player cell run and its picture moving."
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing('playwright (pip install playwright)')
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run'])
        p = b.new_page(viewport=dict(width=1280, height=860)); p.set_default_timeout(30_000); p.set_default_navigation_timeout(30_000)
        p.goto(lab)
        p.wait_for_selector('.jp-Notebook .jp-CodeCell .cm-content')
        try: run_cell(p, 0); playing(p)
        except Exception: p.screenshot(path=shots/'failed.png'); raise
        try: yield p
        finally:
            p.locator('.gg canvas').screenshot(path=shots/'player_last.png'); b.close()

# ---- eyes and hands
def data(p, name): return p.evaluate(f'{ROOT}.dataset.{name} ?? ""')
def until(p, js, timeout=10_000): p.wait_for_function(js.replace('DATA', f'{ROOT}.dataset'), timeout=timeout)
def playing(p, engine='', timeout=60_000): until(p, f"(DATA.status||'').endsWith('Playing.') && Number(DATA.n)>3 && DATA.engine.startsWith('{engine}')", timeout)
def run_cell(p, i):
    "Run the i-th code cell in place."
    prompt = f"document.querySelectorAll('.jp-CodeCell')[{i}].querySelector('.jp-InputPrompt').textContent"
    p.wait_for_function("document.querySelector('#jp-main-statusbar')?.textContent.includes('| Idle')", timeout=60_000) # the kernel is there
    for _ in range(4):
        if (choice := p.locator('.jp-Dialog .jp-mod-accept')).count(): choice.first.click() # asked too early: which kernel?
        p.locator('.jp-CodeCell').nth(i).locator('.cm-content').click(); p.keyboard.press('Control+Enter')
        try: p.wait_for_function(f"/[*0-9]/.test({prompt})", timeout=5000); break
        except Exception: continue
    if i==0: p.locator('.gg').first.wait_for(timeout=60_000); p.locator('.gg').first.scroll_into_view_if_needed()
def focus(p): p.locator('.gg canvas').click()

def look(p):
    "The picture on the canvas, (H, W, 3) int16."
    url = p.evaluate(f"{ROOT}.querySelector('canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(b64decode(url.split(',')[1]))).convert('RGB')).astype(np.int16)

@contextmanager
def holding(p, *keys):
    "Hold keys until the kernel has used them (the page shows it), and a moment longer; let go afterwards."
    for k in keys: p.keyboard.down(k)
    try: yield
    finally:
        for k in keys: p.keyboard.up(k)

def change(a, b): "Mean absolute change of the view, without the status bar (levels)."; n = a.shape[0]*4//5; return np.abs(a[:n]-b[:n]).mean()

def shift(a, b):
    "By how many columns the view moved to the right from `a` to `b` (px)."
    rows = slice(a.shape[0]//5, a.shape[0]*7//10); a,b = a[rows].mean(-1),b[rows].mean(-1); w = a.shape[1]; reach = w*3//16
    cost = {s:np.abs(a[:,max(0, -s):w-max(0, s)]-b[:,max(0, s):w+min(0, s)]).mean() for s in range(-reach, reach+1)}
    return min(cost, key=cost.get)

RECORD = """() => { // keep every drawn frame for a while, in the page, where none is missed
  const root = document.querySelector('.gg'), c = root.querySelector('canvas'); window.film = []; let last = -1
  window.stopFilm = false
  const look = () => {
    if (root.dataset.n !== last) { last = root.dataset.n
      film.push({n: +last, pressed: root.dataset.pressed, w: c.width, h: c.height, rgba: c.getContext('2d').getImageData(0, 0, c.width, c.height).data}) }
    if (!stopFilm && film.length < 80) requestAnimationFrame(look)
  }
  look() }"""
FETCH = """() => { stopFilm = true; return film.map(f => { let s = ''; for (const b of f.rgba) s += String.fromCharCode(b); return [f.n, f.pressed, f.w, f.h, btoa(s)] }) }"""

def film(p, *keys, ms):
    "Hold keys for `ms` and record what is drawn: a list of (frame number, pressed, picture)."
    p.evaluate(RECORD)
    with holding(p, *keys): p.wait_for_timeout(ms)
    p.wait_for_timeout(150); out = p.evaluate(FETCH)
    return [(n, pressed, np.frombuffer(b64decode(b), np.uint8).reshape(h, w, 4)[...,:3].astype(np.int16)) for n,pressed,w,h,b in out]

def motion(f, button):
    "From frame to frame, over the frames in which the kernel pressed just `button`: (median shift px, median change)."
    pairs = [(a, b) for (m,_,a),(n,pressed,b) in zip(f, f[1:]) if n-m<=2 and pressed==button]
    assert len(pairs)>=3, f'{button or "nothing"} was pressed in {len(pairs)} of {len(f)} frames'
    return float(np.median([shift(*x) for x in pairs])), round(float(np.median([change(*x) for x in pairs])), 2)

def engines(p): return p.eval_on_selector_all('.widget-dropdown select option', 'os => os.map(o => o.textContent)')

def obeys(p, starts=4):
    "The view moves right while left is held, left while right is held, and stays where it is when nothing is; all of it from one start."
    for k in range(starts): # a start may face a bare wall or a fireball, where no shift can be seen
        try: return obeys_from_here(p)
        except AssertionError as e:
            print(f'start {k+1}: {e}')
            if k==starts-1: raise

def obeys_from_here(p):
    focus(p); p.keyboard.press('r'); until(p, "DATA.pressed===''"); p.wait_for_timeout(400)
    still = motion(film(p, ms=700), '')
    left,right,a,d = [motion(film(p, key, ms=700), button) for key,button in (('ArrowLeft', 'TURN_LEFT'), ('ArrowRight', 'TURN_RIGHT'), ('KeyA', 'TURN_LEFT'), ('KeyD', 'TURN_RIGHT'))]
    note = f'(shift in px, change in levels) from frame to frame: idle {still}, ← {left}, → {right}, A {a}, D {d}'
    assert abs(still[0])<1 and min(left[0], a[0])>=1 and max(right[0], d[0])<=-1, note
    assert min(x[1] for x in (left, right, a, d))>2*still[1], note # medians: a hit's red flash or a death does no harm
    return note

# ---- the tests, in the order of a visit
def test_hint_and_focus(page):
    assert page.locator('.gg-hint').is_visible() and 'Click' in page.locator('.gg-hint').inner_text()
    page.keyboard.press('Escape'); page.keyboard.down('ArrowLeft'); page.wait_for_timeout(250); page.keyboard.up('ArrowLeft')
    assert data(page, 'pressed')=='' # without focus nothing is captured
    focus(page)
    assert not page.locator('.gg-hint').is_visible() and 'Esc' in page.locator('.gg-focus').inner_text()
    assert page.evaluate("document.activeElement.tagName")=='CANVAS'

def test_picture_obeys_keys(page): print('real or neural:', data(page, 'engine'), obeys(page))

def test_two_keys_and_blur(page):
    focus(page)
    with holding(page, 'ArrowLeft', 'Space'):
        until(page, "DATA.pressed.split(' ').sort().join()==='ATTACK,TURN_LEFT'")
        page.locator('.gg .gg-down').first.wait_for()
        page.evaluate("document.activeElement.blur()") # the keys are still down, but no longer ours
        until(page, "DATA.pressed===''"); page.wait_for_timeout(300); assert data(page, 'pressed')==''
    focus(page)
    with holding(page, 'ArrowLeft', 'ArrowRight', 'Control'): until(page, "DATA.pressed==='ATTACK'") # opposites cancel
    until(page, "DATA.pressed===''")

def test_notebook_keeps_still(page):
    "Arrows, Space and letters neither scroll the page nor work as the notebook's shortcuts (A adds a cell, D D deletes one)."
    focus(page); where = "[...document.querySelectorAll('.jp-WindowedPanel-outer, .jp-Notebook')].map(e => e.scrollTop).join()+'|'+document.querySelectorAll('.jp-Cell').length"
    before = page.evaluate(where)
    for k in ('ArrowDown', 'ArrowDown', 'Space', 'KeyA', 'KeyB', 'KeyD', 'KeyD'): page.keyboard.press(k, delay=30)
    assert page.evaluate(where)==before

def test_speed(page, shots):
    "Frames a second and delay, as the page measures them; written to `browser.json`."
    focus(page); page.keyboard.press('r'); page.wait_for_timeout(600); delays = []
    for i in range(14):
        with holding(page, ('ArrowLeft', 'ArrowRight')[i%2]): page.wait_for_timeout(130+13*(i%5)) # at any time within a frame
        page.wait_for_timeout(90)
    page.wait_for_timeout(2300)
    fps,delays = float(data(page, 'fps')),[float(x) for x in data(page, 'latency').split()]
    with holding(page, 'ArrowLeft', 'Space'):
        until(page, "DATA.pressed.includes('ATTACK')"); page.wait_for_timeout(60); page.evaluate("document.querySelector('.widget-hbox').scrollIntoView({block: 'start'})"); page.wait_for_timeout(60); page.screenshot(path=shots/'player.png')
    figures = dict(engine=data(page, 'engine'), fps=fps, delay_median=float(np.median(delays)), delay_worst=max(delays), delays=delays)
    (shots/'browser.json').write_text(json.dumps(figures, indent=1)); print(figures)
    assert fps>=8 and len(delays)>=10 and np.median(delays)<500

def test_keys_live_beside_a_busy_cell(page):
    run_cell(page, 1); page.wait_for_timeout(300)
    focus(page); step = int(data(page, 'step'))
    with holding(page, 'ArrowRight'): until(page, "DATA.pressed==='TURN_RIGHT'", 3000)
    page.wait_for_timeout(700)
    assert int(data(page, 'step'))-step>=5
    prompt = "document.querySelectorAll('.jp-CodeCell')[1].querySelector('.jp-InputPrompt').textContent"
    assert '*' in page.evaluate(prompt) # the cell was busy all the while
    until(page, f"!{prompt}.includes('*')")

def test_pause_and_reset(page):
    focus(page); page.keyboard.press('p'); until(page, "DATA.status.endswith('Paused.')".replace('endswith', 'endsWith'))
    page.wait_for_timeout(400) # the frame that was being made when the key came is still drawn
    a = look(page); n = data(page, 'n'); page.wait_for_timeout(500); assert data(page, 'n')==n and change(a, look(page))==0
    page.keyboard.press('r'); until(page, f'Number(DATA.n)>{n}') # a paused game may be reset, and shows its first picture
    page.locator('button[title="Stop or go on (P)"]').click(); playing(page)

def test_each_engine(page, shots):
    names = engines(page); first = data(page, 'engine'); assert names
    for name in names[1:]+names[:1]:
        page.select_option('.widget-dropdown select', label=name); playing(page, name); until(page, f"DATA.engine==='{name}'", 60_000)
        if name in ('real', 'neural') and name!=first: print(name, obeys(page))
        if name!=first: page.locator('.gg').screenshot(path=shots/f'engine_{name}.png')

def test_reload_finds_the_game_again(page):
    "A reloaded page answers none of the frames sent to the old one; `hello` must get the game going again."
    page.locator('.gg').first.wait_for(); page.evaluate(f"{ROOT}.remove()"); page.wait_for_timeout(1500)
    page.reload(); page.wait_for_selector('.jp-Notebook .jp-CodeCell .cm-content'); run_cell(page, 0); playing(page)
