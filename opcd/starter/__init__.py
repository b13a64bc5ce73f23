"""A small task that runs as it is, to begin with.

write  puts its files into a folder
"""

from opcd.starter.write import write_starter as write_starter
