"""The page to read judgements and training runs on: one HTML file that needs no server and no network.

`python -m report FOLDER` makes it. read.py finds what is in the folders, judgement.py takes a judgement apart, build.py
packs all of it into the page, and the page itself is page.html, page.css and the scripts beside it.
"""

from report.build import build, write
from report.read import find
