"""`report/index.html`: what `verify` found, as one page that needs nothing else, without a script and off the network.

`page.py` renders `page.html` with `page.css` inside; each other module makes one part of what it shows.
"""
