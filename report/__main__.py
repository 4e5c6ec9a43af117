"""python -m report"""

from files import one_line_errors
from common import parse_config
from report import Config, main

if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
