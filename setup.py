"Installs the package from `settings.ini`, which is the one place where name, version and requirements are written."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in s.items() if k.endswith('_requirements')}

class BuildWithList(build_py):
    "A wheel carries none of `data/`, only the list of it (names, sizes, SHA-256), by which `gamengen fetch` gets the rest."
    def run(self):
        super().run()
        if not self.editable_mode: shutil.copyfile(here/'data'/'artifacts.json', Path(self.build_lib)/'gamengen_nb'/'artifacts.json')

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'],
    author=s['author'], author_email=s['author_email'], url=s['git_url'], license='Apache-2.0', license_files=['LICENSE'],
    packages=find_packages(include=['gamengen_nb', 'gamengen_nb.*']), package_data={'gamengen_nb': ['static/*']}, include_package_data=False,
    python_requires='>=' + s['min_python'], install_requires=s['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': s['console_scripts'].split()}, cmdclass={'build_py': BuildWithList},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown', zip_safe=False)
