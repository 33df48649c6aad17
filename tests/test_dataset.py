"""Recordings survive kills, full disks and flipped bits, and frames and actions stay aligned from the recorder to the window."""
import os, resource, signal, subprocess, sys, time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from gamengen_nb.core import ActionError, ActionSpec, ConfigError, DataError, rng
from gamengen_nb.dataset import (RandomPolicy, ScriptedPolicy, coverage, damaged, decode_png, encode_png, episode_files, episode_id, join_rows, play_episode,
    read_episode, read_meta, record, split_of, targets, window, write_episode)

class Echo(gymnasium.Env):
    "Its next frame shows the last action: red and green for the two buttons, blue counts the frames; a reset is black. Noise below makes files big."
    action_spec,frame_tics,scenario = ActionSpec(('RED', 'GREEN')),2,'echo'
    action_space,observation_space = gymnasium.spaces.MultiBinary(2),gymnasium.spaces.Box(0, 255, (24, 24, 3), np.uint8)
    def show(self, a):
        f = np.zeros((24, 24, 3), np.uint8); f[:8,:,:2] = np.uint8(200*np.asarray(a)); f[:8,:,2] = self.t
        f[8:] = self.np_random.integers(0, 256, (16, 24, 3)); return f
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed); self.t,self.end = 0,int(self.np_random.integers(4, 30)); return self.show([0, 0]), dict(variables=dict(T=0.))
    def step(self, a): self.t += 1; return self.show(a), float(self.t), self.t>=self.end, False, dict(variables=dict(T=float(self.t)))

POLICY = RandomPolicy(Echo.action_spec.table())
def rec(folder, env=None, **kw): return record(env or Echo(), POLICY, folder, **(dict(episodes=6, seed=2, progress=False)|kw))
def content(folder): return {f.relative_to(folder).as_posix():f.read_bytes() for f in sorted(Path(folder).rglob('*')) if f.is_file()}
def same(a, b): return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ('frames', 'actions', 'rewards', 'variables')) and (a.terminated, a.truncated, a.meta)==(b.terminated, b.truncated, b.meta)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): folder = tmp_path_factory.mktemp('whole'); rec(folder); return folder

# ---- alignment, streams, splits
def load(folder):
    eps = [read_episode(f) for f in episode_files(folder)]
    return eps, np.concatenate([e.frames for e in eps]), join_rows([(e.meta|dict(terminated=e.terminated), e.actions) for e in eps])

def shown(frames): return frames[...,0,0,:2]/200

def test_the_target_shows_the_newest_action_of_its_window(whole, tmp_path):
    rec(tmp_path, episodes=40); eps,x,rows = load(tmp_path)
    i = targets(rows, joins=False); ctx,a = window(rows, i, T=4)
    assert np.array_equal(shown(x[i]), a[:,-1]) and np.array_equal(ctx[:,-1], i-1)
    for k in (1, 2, 3): # slot by slot: the frame in slot k was caused by the action in slot k-1, unless it starts a life
        inside = (rows.frame[ctx[:,k]]>0)&(ctx[:,k]>ctx[:,k-1]); assert inside.any() and np.array_equal(shown(x[ctx[inside,k]]), a[inside,k-1])
    assert all(e.rewards[0]==1 and e.variables[0,0]==0 for e in eps)                    # reward of the action, variables of the frame

def test_joins_are_learned_and_nothing_else_is_crossed(tmp_path):
    rec(tmp_path, episodes=40); rec(tmp_path, episodes=3, stream=1); eps,x,rows = load(tmp_path)
    j = np.setdiff1d(targets(rows), targets(rows, joins=False))
    assert len(j)>10 and (rows.frame[j]==0).all() and (shown(x[j])==0).all()            # the new life is black whatever was pressed
    ctx,_ = window(rows, targets(rows), T=8); i = targets(rows)
    assert (rows.split[ctx]==rows.split[i][:,None]).all() and (rows.frame[rows.seg_start]==0).all()
    start = np.cumsum([0]+[len(e) for e in eps])[40]; assert (ctx[i>=start]>=start).all()   # no window of stream 1 reaches into stream 0
    assert {str(s) for s in rows.split}>={'train'} and not set(targets(rows, 'val'))&set(targets(rows, 'train'))

def test_a_cut_is_no_join():
    m = lambda n,end: dict(id='0'*16, seed=0, stream=0, n=n, terminated=end)
    rows = join_rows([(m(0, True), np.ones((3, 1))), (m(1, False), np.ones((2, 1))), (m(2, True), np.ones((2, 1))), (m(4, True), np.ones((1, 1)))])
    assert rows.seg_start.tolist()==[0, 0, 0, 0, 0, 5, 5, 7] and targets(rows).tolist()==[1, 2, 3, 4, 6]

def test_early_windows_repeat_the_first_frame_with_the_noop():
    rows = join_rows([(dict(id='0'*16, seed=0, stream=0, n=0, terminated=True), np.arange(1, 7, dtype=np.float32)[:,None])])
    ctx,a = window(rows, [1, 2, 5], T=3)
    assert ctx.tolist()==[[0, 0, 0], [0, 0, 1], [2, 3, 4]] and a[...,0].tolist()==[[0, 0, 1], [0, 1, 2], [3, 4, 5]]
    assert window(rows, [1], T=3, noop=np.float32([9]))[1][0,:,0].tolist()==[9, 9, 1]

def test_splits_hang_on_the_id_alone(whole):
    ids = [episode_id(0, s, n) for s in range(8) for n in range(500)]
    got = [split_of(dict(id=i, seed=0)) for i in ids]; share = [got.count(k)/len(got) for k in ('train', 'val', 'test')]
    assert np.allclose(share, [.9, .05, .05], atol=.015) and len(set(ids))==4000
    assert episode_id(0, 0, 0)=='09d60d127807bde1' and split_of(dict(id='09d60d127807bde1', seed=0))=='train'   # pinned: old recordings keep their split
    assert split_of(dict(id=ids[0], seed=9000))==split_of(dict(id=ids[0], seed=0, source='scripted'))=='heldout'
    for f in episode_files(whole): m = read_meta(f); assert m['id']==episode_id(m['seed'], m['stream'], m['n'])

def test_policies_hang_on_the_episode():
    play = lambda P,*key: (P.reset(*key), np.stack([P(None, None) for _ in range(60)]))[1]
    for P in (POLICY, ScriptedPolicy(Echo.action_spec.table())):
        assert np.array_equal(play(P, 0, 0, 1), play(P, 0, 0, 1)) and not np.array_equal(play(P, 0, 0, 1), play(P, 0, 0, 2))
    assert abs(sum(coverage(play(POLICY, 5), Echo.action_spec).values())-1)<1e-9

def test_a_wrong_action_of_a_policy_stops_the_recording_with_its_reason(tmp_path):
    class Mad(RandomPolicy):
        def __call__(self, obs, info): return [np.nan, 0]
    with pytest.raises(ActionError, match='finite'): record(Echo(), Mad(POLICY.table), tmp_path, episodes=1, progress=False)

# ---- files
def test_pixels_are_exact():
    for x in (rng('px').integers(0, 256, (24, 32, 3)), rng('px').integers(0, 5, (24, 32, 3))*50, np.zeros((3, 1, 3)), np.arange(256).repeat(3).reshape(16, 16, 3)):
        x = x.astype(np.uint8); assert np.array_equal(decode_png(encode_png(x)), x)

def test_a_damaged_file_is_named_or_harmless(whole, tmp_path):
    src = episode_files(whole)[0]; good = src.read_bytes(); ep = read_episode(src); r = rng('flips'); p = tmp_path/'stream-0000'/'ep-000000.parquet'; p.parent.mkdir()
    foot = int.from_bytes(good[-8:-4], 'little')+8                                      # half of the flips go into Parquet's own description, which has no checksum
    places = [*r.integers(0, len(good), 20), *r.integers(len(good)-foot, len(good), 20)]
    damage = [good[:k] for k in (0, 3, 11, len(good)//3, len(good)-9, len(good)-1)]+[good[:k]+bytes([good[k]^(1<<int(r.integers(8)))])+good[k+1:] for k in places]
    caught = 0
    for b in damage:
        p.write_bytes(b)
        try: assert same(read_episode(p), ep)
        except DataError as e: caught += 1; assert p.name in str(e) and '\n' not in str(e)
        try: assert read_meta(p)==ep.meta|dict(frames=len(ep))
        except DataError as e: assert p.name in str(e)
    assert caught>=len(damage)//2
    assert p in damaged(tmp_path) or same(read_episode(p), ep)

def test_missing_and_foreign_files(tmp_path, whole):
    for f,call in ((tmp_path/'no.parquet', read_episode), (tmp_path/'no.parquet', read_meta), (tmp_path, episode_files), (tmp_path, read_episode)):
        with pytest.raises(DataError): call(f)
    with pytest.raises(DataError, match='another seed'): rec(whole, seed=3)
    other = Echo(); other.frame_tics = 4
    with pytest.raises(DataError, match='frame_tics'): rec(whole, other)
    with pytest.raises(ConfigError): rec(whole, episodes=0)

# ---- kills and full disks
def test_what_is_finished_is_kept_and_counted(whole, tmp_path):
    before = content(whole); assert rec(whole, episodes=4)==sum(read_meta(f)['frames'] for f in episode_files(whole)) and content(whole)==before
    rec(tmp_path, episodes=2); (tmp_path/'stream-0000'/'.ep-000002.parquet.1.tmp').write_bytes(b'half'); rec(tmp_path)
    assert content(tmp_path)==before                                                    # leftovers of a kill are swept away
    f = episode_files(tmp_path)[3]; f.write_bytes(f.read_bytes()[:-50])
    with pytest.raises(DataError, match=f.name): rec(tmp_path)
    f.unlink(); rec(tmp_path); assert content(tmp_path)==before                         # as the message says: delete it, run again

def test_ctrl_c_while_recording(whole, tmp_path):
    old = signal.signal(signal.SIGINT, signal.default_int_handler) # a test run in the background of a script may have Ctrl-C ignored
    class Pressed(Echo):
        steps = 0
        def step(self, a):
            self.steps += 1
            if self.steps==40: signal.raise_signal(signal.SIGINT)
            return super().step(a)
    try:
        with pytest.raises(KeyboardInterrupt): rec(tmp_path, Pressed())
    finally: signal.signal(signal.SIGINT, old)
    assert 0<len(episode_files(tmp_path))<6 and not damaged(tmp_path); rec(tmp_path); assert content(tmp_path)==content(whole)

CHILD = f'''
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from gamengen_nb.core import GamegenError
'''

def child(code, *args, **kw):
    return subprocess.Popen([sys.executable, '-c', CHILD+code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ|dict(OMP_NUM_THREADS='1'), **kw)

def test_full_disk_while_recording(whole, tmp_path):
    size = [f.stat().st_size for f in episode_files(whole)]; n = next(k for k in range(1, 6) if size[k]>max(size[:k]))
    p = child('''
from test_dataset import rec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),)*2)
try: rec(sys.argv[1])
except GamegenError as e: print(type(e).__name__, e)
''', tmp_path, size[n]-1)
    out,err = p.communicate(timeout=300); assert not err and p.returncode==0, err
    assert out.startswith('DataError Could not write') and 'Free some space' in out and out.count('\n')==1
    assert len(content(tmp_path))==n and not damaged(tmp_path)                          # n whole episodes, no temporary file
    rec(tmp_path); assert content(tmp_path)==content(whole)

def doom(folder, episodes=3):
    from gamengen_nb.env import DoomEnv
    env = DoomEnv('defend_the_line', height=60, width=80)
    try: return record(env, RandomPolicy(env.action_spec.table()), folder, episodes=episodes, seed=2, progress=False)
    finally: env.close()

def test_kill_9_while_recording_doom(tmp_path):
    p = child('''
from test_dataset import doom
doom(sys.argv[1], 1000)
''', tmp_path/'cut')
    end = time.monotonic()+300
    while not (tmp_path/'cut'/'stream-0000'/'ep-000000.parquet').exists() and time.monotonic()<end and p.poll() is None: time.sleep(.02)
    time.sleep(.05); os.killpg(p.pid, signal.SIGKILL); p.wait(); p.stdout.close(); p.stderr.close()   # the recorder and its ViZDoom, at once
    kept = len(episode_files(tmp_path/'cut')); assert not damaged(tmp_path/'cut')
    n = max(kept+1, 2); doom(tmp_path/'cut', n); doom(tmp_path/'whole', n)
    assert content(tmp_path/'cut')==content(tmp_path/'whole')                           # another process, another past: the same bytes
