"Installs the package from `settings.ini`, which is the one place where name, version and requirements are written."
from configparser import ConfigParser
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in s.items() if k.endswith('_requirements')}

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'],
    author=s['author'], author_email=s['author_email'], url=s['git_url'], license='Apache-2.0',
    packages=find_packages(include=['gamengen_nb', 'gamengen_nb.*']), include_package_data=True,
    package_data={'gamengen_nb': ['static/*', 'artifacts.json']},
    python_requires='>=' + s['min_python'], install_requires=s['requirements'].split(),
    extras_require=extras, entry_points={'console_scripts': s['console_scripts'].split()},
    long_description=open('README.md', encoding='utf-8').read() if __import__('os').path.exists('README.md') else '',
    long_description_content_type='text/markdown', zip_safe=False)
