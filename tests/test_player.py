"""The player without a browser: keys, flow control, the pump's thread, the widget's messages, the window."""
import os, subprocess, sys, threading, time

import gymnasium
import numpy as np
import pytest

from gamengen_nb.core import ActionSpec, ConfigError, DataError
from gamengen_nb.player import KEYMAP, Engines, Flow, FramePump, Held, Keys, Player, SideBySide, play_window

LINE = ActionSpec(('TURN_LEFT', 'TURN_RIGHT', 'ATTACK'), exclusive=(('TURN_LEFT', 'TURN_RIGHT'),))

class Toy(gymnasium.Env):
    "Red is the frame number, green the turn, blue the trigger."
    frame_tics = 2
    observation_space = gymnasium.spaces.Box(0, 255, (8, 12, 3), np.uint8)
    action_space = gymnasium.spaces.MultiBinary(3)
    def __init__(self, length=200, breaks=None, spec=LINE, cut=False):
        self.length,self.breaks,self.action_spec,self.cut,self.closed,self.seeds = length,breaks,spec,cut,False,[]
    def picture(self, a=(0, 0, 0)): return np.full((8, 12, 3), (self.t, 100*a[0]+200*a[1], 255*a[2]), np.uint8)
    def reset(self, *, seed=None, options=None): self.seeds.append(seed); self.t = 0; return self.picture(), {}
    def step(self, a):
        self.t += 1
        if self.t==self.breaks: raise RuntimeError('the wall\nfell down')
        end = self.t>=self.length; return self.picture(a), 0., end and not self.cut, end and self.cut, {}
    def close(self): self.closed = True

class Clock:
    now = 0.
    def __call__(self): return self.now

def until(f, seconds=30):
    end = time.perf_counter()+seconds
    while not f():
        assert time.perf_counter()<end, 'it did not happen in time'
        time.sleep(.01)

@pytest.fixture
def pump():
    "Makes pumps that are stopped afterwards."
    made = []
    def make(*a, **k): made.append(FramePump(*a, **k)); return made[-1]
    yield make
    for p in made: p.stop()

# ---- keys
def test_every_key_of_the_map_fits_some_game():
    names = {w.lstrip('+-') for wishes in KEYMAP.values() for w in wishes}
    vizdoom = pytest.importorskip('vizdoom')
    assert all(hasattr(vizdoom.Button, n) for n in names)

@pytest.mark.parametrize('held, want', [((), (0, 0, 0)), (('ArrowLeft',), (1, 0, 0)), (('KeyA',), (1, 0, 0)), (('KeyD', 'ControlLeft'), (0, 1, 1)),
    (('ArrowLeft', 'ArrowRight'), (0, 0, 0)), (('ArrowLeft', 'KeyA', 'Space', 'ControlRight'), (1, 0, 1)), (('KeyZ', 'ArrowUp'), (0, 0, 0))])
def test_keys_to_action(held, want): assert tuple(Keys(LINE).action(held))==want

def test_wasd_strafes_where_it_can():
    k = Keys(ActionSpec(('MOVE_LEFT', 'MOVE_RIGHT', 'TURN_LEFT', 'TURN_RIGHT', 'MOVE_FORWARD', 'MOVE_BACKWARD', 'USE', 'ATTACK'), exclusive=(('MOVE_LEFT', 'MOVE_RIGHT'),)))
    press = lambda *held: k.names(k.action(held))
    assert press('KeyA', 'KeyW')==['MOVE_LEFT', 'MOVE_FORWARD'] and press('ArrowLeft')==['TURN_LEFT'] and press('Comma', 'Period')==[]
    assert press('KeyE', 'Space')==['USE', 'ATTACK']

def test_deltas_have_two_directions():
    k = Keys(ActionSpec(('ATTACK', 'TURN_LEFT_RIGHT_DELTA'), ('binary', 'delta'), (1., 30.)))
    assert k.action({'ArrowRight'}).tolist()==[0, 6] and k.action({'ArrowLeft', 'Space'}).tolist()==[1, -6] and k.action({'ArrowLeft', 'KeyD'}).tolist()==[0, 0]
    assert k.names(k.action({'ArrowLeft'}))==['TURN_LEFT_RIGHT_DELTA -']
    assert [r['name'] for r in k.legend()]==['TURN_LEFT_RIGHT_DELTA -', 'TURN_LEFT_RIGHT_DELTA +', 'ATTACK']

def test_held_latches_taps_across_threads():
    h = Held(); seen = set()
    def tap():
        for i in range(200): h.press({f'k{i}'}, i); h.press((), i)
    t = threading.Thread(target=tap); t.start()
    while t.is_alive(): seen |= h.take()[0]
    assert seen|h.take()[0]=={f'k{i}' for i in range(200)} and h.take()[0]==set() # none lost, none twice

# ---- flow control
def test_flow_waits_times_out_and_greets():
    c = Clock(); f = Flow(clock=c)
    assert [f.send() for _ in range(5)]==[1, 2, 0, 0, 0] and f.dropped==3
    c.now = 1.1; assert f.send()==3 and f.send()==0 # one second without an answer: one more
    f.ack(3); assert [f.send() for _ in range(3)]==[4, 5, 0]
    f.ack(2); assert f.acked==3 # an old answer takes nothing back
    f.hello(); assert f.acked==5 and f.send()==6
    c.now = 11.05; assert not f.silent()
    c.now = 11.2; assert f.silent()
    assert not Flow(None, clock=c).silent()

def test_sleeps_after_ten_seconds_without_ack_and_wakes_on_hello():
    c = Clock(); said = []; p = FramePump(Toy(), lambda *_: None, said.append, clock=c); p.held.press({'Space'})
    for _ in range(400):
        if p._rest(): break
        p.step_once(); c.now += 2/35
    assert p.asleep and 10<c.now<10.2 and not p.held.now # keys are released
    assert 2+8<=p.flow.sent<=2+10 # two, then one a second
    frames = p.frames; p.hello(); assert not p.asleep and not p._rest(); p.step_once(); assert p.frames==frames+1
    p.doze(); p.ack(p.flow.sent); assert not p.asleep # a late answer shows that somebody is there

def test_a_pause_is_no_silence():
    c = Clock(); p = FramePump(Toy(), lambda *_: None, clock=c); p.step_once(); p.pause(); c.now = 60.
    assert p._rest() and not p.asleep
    p.reset(); assert not p._rest(); p.step_once(); assert p._rest() # a paused game may be reset
    p.pause(False); assert not p._rest() and not p.asleep

# ---- the pump
def test_frames_follow_keys_and_carry_their_number(pump):
    got = []; p = pump(Toy(length=4), lambda f, i: got.append((f[0,0].tolist(), i['keys'], i['pressed'])), in_flight=None, seed=5)
    for n,held in enumerate([(), ('ArrowLeft', 'Space'), ('ArrowRight',), (), (), (), ()]): p.held.press(held, n); p.step_once()
    assert [f for f,_,_ in got]==[[0, 0, 0], [1, 100, 255], [2, 200, 0], [3, 0, 0], [4, 0, 0], [0, 0, 0], [1, 0, 0]] # ends, begins anew
    assert [k for _,k,_ in got]==[None, 1, 2, 3, 4, 4, 6] and got[1][2]==['TURN_LEFT', 'ATTACK']
    assert p.env.seeds==[5, None] # the seed is for the first episode

def test_truncation_resets_too(pump):
    p = pump(Toy(length=2, cut=True), lambda *_: None, in_flight=None)
    assert [int(p.step_once()[0,0,0]) for _ in range(5)]==[0, 1, 2, 0, 1]

def test_real_time_thread_start_stop(pump):
    got = []; p = pump(Toy(), lambda f, i: (got.append(int(f[0,0,0])), p.ack(i['n'])))
    assert p.state=='Stopped.'; p.start(); assert p.start() is p; until(lambda: len(got)>10); thread = p._thread; p.stop()
    assert not thread.is_alive() and not p.running and got==list(range(len(got))); n = len(got); time.sleep(.15); assert len(got)==n
    p.start(); until(lambda: len(got)>n+2); assert got==list(range(len(got))) # goes on where it stopped

def test_keeps_the_clock(pump):
    "Never faster than 17.5 frames a second, however long an earlier frame took."
    times = []; first = threading.Event()
    def on_frame(f, i):
        times.append(time.perf_counter()); p.ack(i['n'])
        if not first.is_set(): first.set(); time.sleep(.4)
    p = pump(Toy(), on_frame); p.start(); until(lambda: len(times)>12); p.stop()
    assert times[-1]-times[1]>(len(times)-2)*2/35-.03 # no running to catch up

def test_a_failing_engine_becomes_one_sentence_and_reset_tries_again(pump):
    said = []; p = pump(Toy(breaks=3), lambda f, i: p.ack(i['n']), said.append); p.start(); until(lambda: 'RuntimeError' in said[-1])
    assert said[-1]=='The engine failed with RuntimeError: the wall fell down (Reset tries again.)' and p.running and isinstance(p.error, RuntimeError)
    p.env.breaks = None; p.reset(); until(lambda: said[-1]=='Playing.')
    p.use(Toy(breaks=1)); until(lambda: 'RuntimeError' in said[-1]); p.use(Toy()); until(lambda: said[-1]=='Playing.') # another engine helps, too

def test_bad_engines_and_bad_frames_are_named(pump):
    def no_weights(): raise ConfigError('The weights are not here; run `gamengen fetch`.')
    said = []; p = pump(no_weights, lambda *_: None, said.append); p.start(); until(lambda: 'gamengen fetch' in said[-1])
    assert said[-1].startswith('The weights are not here')
    with pytest.raises(ConfigError, match='is no engine'): FramePump(gymnasium.Env, print).step_once()
    bad = Toy(); bad.picture = lambda a=None: np.zeros((3, 8, 12), np.float32)
    with pytest.raises(DataError, match=r'uint8 \(H, W, 3\), this one returned float32 \(3, 8, 12\)'): FramePump(bad, print).step_once()

def test_a_failing_screen_is_told_too(pump):
    said = []
    def on_frame(f, i): raise OSError('the page is gone')
    p = pump(Toy(), on_frame, said.append); p.start(); until(lambda: 'the page is gone' in said[-1])

# ---- engines
def test_engines_are_made_once_and_closed_by_their_maker():
    mine,made = Toy(),[]; e = Engines(dict(a=mine, b=lambda: made.append(Toy()) or made[-1]))
    assert e.maker('a')() is mine and e.maker('b')() is e.maker('b')() and len(made)==1 and e.current=='b'
    e.close(); assert made[0].closed and not mine.closed
    with pytest.raises(ConfigError, match="no engine 'c' here; there is a, b"): e.maker('c')
    with pytest.raises(ConfigError, match='at least one engine'): Player({})

def test_side_by_side():
    two = SideBySide(Toy(2), Toy(9)); f,_ = two.reset(seed=1); assert two.observation_space.contains(f) and two.pair[0].seeds==[1]
    assert [(int(f[0,0,0]), int(f[0,-1,0])) for f in (two.step(LINE.press('ATTACK'))[0] for _ in range(4))]==[(1, 1), (2, 2), (0, 3), (1, 4)]
    with pytest.raises(ConfigError, match='same buttons'): SideBySide(Toy(), Toy(spec=ActionSpec(('ATTACK',))))

# ---- the widget, its page played by hand
@pytest.fixture
def page():
    "A player whose messages to the page are caught, and the page's voice."
    p = Player(dict(toy=Toy, other=lambda: Toy(length=3), broken=lambda: Toy(breaks=2))); sent = []; p.screen.send = lambda m, buffers: sent.append((m, buffers))
    tell = lambda kind, view='v1', **m: p._message(None, dict(type=kind, view=view, **m), [])
    def answer(until_): until(lambda: tell('ack', n=p.pump.flow.sent) or until_())
    yield p, sent, tell, answer
    p.stop(); p.close()

def test_widget_starts_on_hello_and_sends_rgba(page):
    p,sent,tell,answer = page
    assert not p.pump.running; tell('hello'); answer(lambda: len(sent)>3)
    m,(rgba,) = sent[0]; a = np.frombuffer(rgba, np.uint8).reshape(m['h'], m['w'], 4)
    assert (m['type'], m['w'], m['h'], m['engine'], round(m['period']))==('frame', 12, 8, 'toy', 57) and (a[...,3]==255).all() and (a[...,0]==0).all()
    assert [r['name'] for r in p.screen.legend]==['TURN_LEFT', 'TURN_RIGHT', 'ATTACK'] and p.screen.status=='toy: Playing.'

def test_widget_keys_come_back_with_number_and_view(page):
    p,sent,tell,answer = page; tell('hello'); tell('keys', held=['ArrowLeft', 'Space'], number=7); tell('keys', held=[], number=8) # a tap
    answer(lambda: any(m['keys']==8 for m,_ in sent)); first = next(m for m,_ in sent if m['keys']==8)
    assert first['pressed']==['TURN_LEFT', 'ATTACK'] and first['view']=='v1'

def test_only_the_focused_view_drives(page):
    p,sent,tell,answer = page; tell('hello'); tell('hello', 'v2'); tell('keys', held=['Space'], number=1)
    tell('keys', 'v2', held=['KeyD'], number=1); assert p.pump.held.now=={'Space'}
    tell('focus', 'v2'); tell('keys', 'v2', held=['KeyD'], number=2); assert p.pump.held.now=={'KeyD'} and p.driver=='v2'
    p.pump.stop(); f = p.pump.flow; f.sent += 2; acked = f.acked
    tell('ack', 'v1', n=f.sent); assert f.acked==acked # only the driver's answers count …
    f.heard -= 2; tell('ack', 'v1', n=10**6); assert f.acked==f.sent # … while it answers
    p.pump.start(); tell('keys', 'v2', held=['KeyD'], number=3)
    tell('bye', 'v2'); assert not p.pump.held.now and not p.pump.asleep
    tell('bye', 'v1'); assert p.pump.asleep; tell('hello', 'v3'); assert not p.pump.asleep and p.driver=='v3'

def test_widget_pause_reset_switch_and_error(page):
    p,sent,tell,answer = page; tell('hello'); answer(lambda: len(sent)>4)
    tell('do', what='pause'); assert p.pump.paused and p.toggle.description=='Play'; until(lambda: p.screen.status=='toy: Paused.')
    p.toggle.click(); answer(lambda: p.screen.status=='toy: Playing.'); assert p.toggle.description=='Pause'
    p.pause()
    with p.pump._lock: n = len(sent) # no frame is half-way
    tell('hello', 'v9'); assert len(sent)==n+1 and sent[-1][1]==sent[-2][1]; p.pause(False) # the page of a paused game is not black
    n = len(sent); p.again.click(); answer(lambda: any(m['step'] and b[0][0]==0 for m,b in sent[n:])) # red is 0: a first frame
    p.pick.value = 'other'; answer(lambda: sent[-1][0]['engine']=='other')
    p.pick.value = 'broken'; answer(lambda: 'RuntimeError: the wall fell down' in p.screen.status)
    p.pick.value = 'toy'; answer(lambda: p.screen.status=='toy: Playing.')

def test_a_later_player_stops_an_earlier_one(page):
    p,sent,tell,answer = page; tell('hello'); answer(lambda: sent); env = p.pump.env; later = Player(dict(toy=Toy)).start()
    assert not p.pump.running and env.closed and p.screen.status=='toy: Stopped.' and p.toggle.description=='Play'
    p.toggle.click(); assert p.pump.running and not later.pump.running; later.close() # its Play button brings it back

def test_answers_bypass_a_busy_shell(page):
    "ipykernel 7.4 would route answers to the shell that last published, which a running cell blocks."
    pytest.importorskip('ipykernel.comm'); from types import SimpleNamespace
    from gamengen_nb.player import _answer_beside
    w = SimpleNamespace(comm=SimpleNamespace(_reply_subshell_for=lambda data, default: None)); _answer_beside(w)
    assert w.comm._reply_subshell_for({}, 'subshell')=='subshell'
    _answer_beside(SimpleNamespace(comm=None)) # other kernels have no such thing

# ---- the window
def script(seen, *events):
    "Post events one after another, each after the one before had its effect."
    import pygame
    def post():
        until(lambda: len(seen)>4)
        for kind,key,scan,done in events:
            pygame.event.post(pygame.event.Event(getattr(pygame, kind), **({} if key is None else dict(key=getattr(pygame, key), scancode=getattr(pygame, scan), mod=0, unicode=''))))
            until(done)
    threading.Thread(target=post, daemon=True).start()

def test_window_with_the_dummy_driver(monkeypatch):
    monkeypatch.setenv('SDL_VIDEODRIVER', 'dummy'); monkeypatch.setenv('SDL_AUDIODRIVER', 'dummy'); pytest.importorskip('pygame'); seen = []
    class Spy(Toy):
        def step(self, a): seen.append(a.tolist()); return super().step(a)
    down,up = 'KEYDOWN','KEYUP'
    script(seen, (down, 'K_LEFT', 'KSCAN_LEFT', lambda: seen[-1]==[1, 0, 0]), (down, 'K_SPACE', 'KSCAN_SPACE', lambda: seen[-1]==[1, 0, 1]),
        (up, 'K_LEFT', 'KSCAN_LEFT', lambda: seen[-1]==[0, 0, 1]), ('WINDOWFOCUSLOST', None, None, lambda: seen[-1]==[0, 0, 0]),
        (down, 'K_ESCAPE', 'KSCAN_ESCAPE', lambda: True))
    r = play_window(dict(toy=Spy), scale=3, seconds=60)
    assert r['frames']>5 and len(r['delays'])==2 and r['delay']>0 and r['fps']>0

def test_window_raises_what_the_engine_raised(monkeypatch):
    monkeypatch.setenv('SDL_VIDEODRIVER', 'dummy'); pytest.importorskip('pygame')
    with pytest.raises(RuntimeError, match='fell down'): play_window(dict(toy=lambda: Toy(breaks=2)), seconds=60)

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='other systems always have a display')
def test_window_without_a_display_says_so():
    env = {k:v for k,v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'SDL_VIDEODRIVER')}
    code = "from gamengen_nb.player import play_window\nfrom gamengen_nb.core import ConfigError\ntry: play_window(dict(a=object))\nexcept ConfigError as e: print(e)"
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert out.stdout.startswith('There is no display') and 'make play' in out.stdout and out.stdout.count('\n')==1 and not out.stderr, out
