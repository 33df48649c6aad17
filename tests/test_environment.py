"""The real game keeps its contract: names, actions, frames, clock, seeds, and one clear sentence for whatever doesn't fit."""
import os, tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from gamengen_nb.core import ActionError, ConfigError, GamegenError, hud_crop, rng, view_crop
from gamengen_nb.env import COUNTERS, VARIABLES, DoomEnv, find_map, native_size, scenarios, shrink

SMALL = dict(height=60, width=80)

@pytest.fixture(scope='module')
def env():
    e = DoomEnv('defend_the_line', **SMALL); yield e; e.close()

def sentence(e): # one paragraph that ends like a sentence and says more than a word
    s = str(e.value); assert '\n' not in s and len(s)>20 and s.rstrip().endswith('.'), s
    return s

@pytest.mark.parametrize('bad', [dict(scenario='atack_the_line'), dict(scenario='freedoom2:MAP99'), dict(scenario='heretic:E1M1'), dict(scenario=f'{__file__}:MAP01'),
    dict(scenario=''), dict(scenario='cig'), dict(skill=0), dict(skill=6), dict(frame_tics=0), dict(height=100), dict(width=0), dict(height=-60), dict(height=960, width=1280),
    dict(buttons=('FLY',)), dict(buttons=()), dict(render_mode='human')])
def test_what_does_not_exist_is_a_config_error(bad):
    with pytest.raises(ConfigError) as e: DoomEnv(**bad)
    assert any(str(v) in sentence(e) or Path(str(v).split(':')[0]).name in sentence(e) for v in bad.values()) or 'buttons' in bad

def test_every_bundled_scenario_and_freedoom_map_is_found():
    assert {'basic', 'defend_the_line', 'health_gathering', 'my_way_home'}<=set(scenarios())
    for name in scenarios(): assert find_map(name)[0].exists()
    assert find_map('freedoom1:e1m1')[2]=='E1M1' and find_map('freedoom2:MAP32')[1].name=='freedoom2.wad'

@pytest.mark.parametrize('bad', [[1, 0], [1, 0, 0, 0], [[1, 0, 0]], [], [np.nan, 0, 0], [0, np.inf, 0], [0, 0, .5], [2, 0, 0], [-1, 0, 0], 1, None, 'left', ['a', 'b', 'c'], {'a':1},
    [None, 0, 0], [1j, 0, 0], [1e300, 0, 0], [[1], [0, 0]]], ids=repr)
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_a_wrong_action_is_refused_and_the_game_goes_on(env, bad):
    env.reset(seed=0)
    with pytest.raises(ActionError) as e: env.step(bad)
    sentence(e); tic = env.step(env.action_spec.noop)[4]['tic']
    assert tic==2 # the wrong action took no time

def test_exclusive_keys_cancel(env):
    _,i = env.reset(seed=0); a = i['variables']['ANGLE']
    assert env.step([1, 1, 0])[4]['variables']['ANGLE']==a

def test_no_step_before_the_start_or_after_the_end(env):
    fresh = DoomEnv('basic', **SMALL)
    with pytest.raises(GamegenError, match='No episode has begun'): fresh.step(fresh.action_spec.noop)
    fresh.close(); env.reset(seed=3); end = cut = False
    while not (end or cut): obs,_,end,cut,info = env.step(env.action_spec.noop)
    assert (end, cut)==(True, False) and info['variables']['HEALTH']==0 and obs.any()   # the last picture stays
    with pytest.raises(GamegenError, match='call reset'): env.step(env.action_spec.noop)
    assert all(env.reset(seed=3)[1]['variables'][c]==0 for c in COUNTERS)               # a new life starts from zero

def test_the_clock_truncates():
    e = DoomEnv('health_gathering', max_tics=20, **SMALL); e.reset(seed=0); ends = []
    while not ends or not any(ends[-1]): ends.append(e.step(e.action_spec.noop)[2:4])
    assert ends==[(False, False)]*9+[(False, True)]; e.close()

def roll(env, seed, frames):
    table,r = env.action_spec.table(),rng('roll', seed); obs,info = env.reset(seed=seed); out,vs,lives = [obs],[info['variables']],0
    for _ in range(frames):
        obs,reward,end,cut,info = env.step(table[r.integers(len(table))]); out.append(obs); vs.append(info['variables']|dict(reward=reward, tic=info['tic']))
        if end or cut: obs,info = env.reset(); out.append(obs); vs.append(info['variables']); lives += 1
    return np.stack(out), vs, lives

def test_the_same_seed_gives_the_same_500_steps(env):
    other = DoomEnv('defend_the_line', **SMALL); roll(other, 99, 30)                    # another past
    (a,va,lives),(b,vb,_) = roll(env, 7, 500),roll(other, 7, 500); other.close()
    assert np.array_equal(a, b) and va==vb and lives>0 and set(va[0])==set(VARIABLES)   # pixels, variables and rewards, deaths included
    assert not np.array_equal(a[:31], roll(env, 8, 30)[0])

def test_the_first_tics_are_skipped_and_turning_ramps_up(env):
    turn = lambda pattern: np.diff([env.reset(seed=0)[1]['variables']['ANGLE']]+[env.step(env.action_spec.press('TURN_LEFT') if p else env.action_spec.noop)[4]['variables']['ANGLE'] for p in pattern])
    assert np.allclose(turn([1]*5), [3.516, 3.516, 5.273, 7.031, 7.031], atol=.01)      # it turns from the first frame on
    assert np.allclose(turn([1, 0, 0, 1]), [3.516, 0, 0, 3.516], atol=.01)

def test_frames_at_three_sizes(env):
    full = DoomEnv('defend_the_line'); x = full.reset(seed=5)[0]; full.close()
    assert x.shape==(120, 160, 3) and x.dtype==np.uint8
    assert np.array_equal(shrink(x, 2), env.reset(seed=5)[0])                           # 80×60 is the area average of 160×120
    big = DoomEnv('freedoom2:MAP01', height=240, width=320, automap=True, skill=2); y,info = big.reset(seed=5)
    assert y.shape==info['automap'].shape==(240, 320, 3) and big.skill==2 and len(info['variables'])==len(VARIABLES)
    kept = info['automap'].copy(); info['automap'][:] = 0; assert np.array_equal(big._look()['automap'], kept); big.close()   # info is the caller's to change
    assert native_size(60, 80)==((160, 120), 2) and native_size(240, 320)==((320, 240), 1)

def test_the_status_bar_can_be_left_out(env):
    bare = DoomEnv('defend_the_line', hud=False, **SMALL); x,y = bare.reset(seed=5)[0],env.reset(seed=5)[0]; bare.close()
    assert not np.array_equal(hud_crop(x), hud_crop(y)) and view_crop(x).shape==(50, 80, 3)

def test_gymnasium_and_sb3_find_nothing_wrong():
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as sb3_check
    e = gymnasium.make('gamengen/Doom-v0', render_mode='rgb_array', **SMALL)
    check_env(e.unwrapped); sb3_check(e)
    assert np.array_equal(e.reset(seed=1)[0], e.render()) and e.unwrapped.metadata['render_fps']==17.5; e.close()

def test_it_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); temp = tmp_path/'temp'; temp.mkdir(); monkeypatch.setattr(tempfile, 'tempdir', str(temp))
    e = DoomEnv('basic', **SMALL); e.reset(seed=0); assert len(os.listdir(temp))==1
    e.close(); e.close()
    assert os.listdir(tmp_path)==['temp'] and not os.listdir(temp)
