"""`python -m multirun_analysis report FOLDER`: all rows of a folder as one HTML file, to read, filter and pass on.

page.py puts the file together. The page's own sources lie here as page.html, *.css and *.js; they need no build step.
"""

from multirun_analysis.report.page import write

__all__ = ["write"]
