"""Run by the installed wheel's own Python in an empty folder (see run_all.py): `use_wheel.py WHEEL DATA`, DATA being the checkout's data folder."""
import importlib, json, os, pkgutil, subprocess, sys, tempfile, zipfile
from importlib.resources import files
from pathlib import Path

def gamengen(*args): return subprocess.run([Path(sys.executable).with_name('gamengen'), *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
def check(ok, what):
    if not ok: sys.exit(f'the wheel: {what}')

wheel,data = map(Path, sys.argv[1:])
names = zipfile.ZipFile(wheel).namelist()
check({'gamengen_nb/static/player.js', 'gamengen_nb/static/player.css', 'gamengen_nb/artifacts.json'} <= set(names), 'static files or artifacts.json are missing')
foreign = [n for n in names if not n.startswith('gamengen_nb') or n.endswith(('.safetensors', '.parquet', '.ipynb', '.gif'))]
check(not foreign, f'holds {foreign}')
check(wheel.stat().st_size < 2**20, f'is {wheel.stat().st_size/2**20:.1f} MB')

import gamengen_nb
check(Path(gamengen_nb.__file__).is_relative_to(sys.prefix), f'{gamengen_nb.__file__} was imported instead')
for m in pkgutil.iter_modules(gamengen_nb.__path__): importlib.import_module(f'gamengen_nb.{m.name}')
listed = json.loads((files('gamengen_nb')/'artifacts.json').read_text(encoding='utf-8'))
check(listed == json.loads((data/'artifacts.json').read_text(encoding='utf-8')), 'its artifacts.json is not the one of data/')

import gymnasium
env = gymnasium.make('gamengen/Doom-v0'); obs,_ = env.reset(seed=0); env.step(env.unwrapped.action_spec.noop); env.close()
check(obs.shape == env.observation_space.shape and str(obs.dtype) == 'uint8', 'the real game does not run')

r = gamengen('--help')
check(r.returncode == 0 and 'fetch' in r.stdout, f'gamengen --help says {r.stderr}')
r = gamengen('demo', '--seconds', 1)
check(r.returncode == 2 and 'fetch' in r.stderr and 'Traceback' not in r.stderr, f'without the engine, gamengen demo says {r.stderr}')
other = json.loads(json.dumps(listed)); other['artifacts'][0]['sha256'] = '0'*64
with tempfile.TemporaryDirectory() as tmp: # an address that offers something else under the same name
    Path(tmp, 'artifacts.json').write_text(json.dumps(other)); r = gamengen('fetch', '--source', tmp)
check(r.returncode == 2 and 'another' in r.stderr, f'from an address with another list, gamengen fetch says {r.stdout}{r.stderr}')
r = gamengen('fetch', '--source', data)
check(r.returncode == 0, f'gamengen fetch says {r.stderr}')
r = gamengen('demo', '--seconds', 1, '--gif', 'out.gif')
check(r.returncode == 0 and Path('out.gif').stat().st_size > 1000, f'with the engine, gamengen demo says {r.stderr}')
check(os.listdir() == ['out.gif'], f'it leaves {os.listdir()} where it is called')
print(f'{wheel.name}: {wheel.stat().st_size/2**10:.0f} KB, {len(names)} files; installed, fetched and played in an empty folder')
