"""The text on which a quantized model is compared with the original: prose and code, by the project."""

SAMPLE_TEXT = '''\
The harbour was quiet in the early morning. Two boats had come in before sunrise, and their crews
were washing the decks while gulls waited on the wall. A woman with a basket asked for the price of
herring, shook her head, and asked again. By nine o'clock the fish were gone, the ice had melted,
and the first children ran along the pier on their way to school.

import os


class Reader:
    """Reads the lines of a file that begin with a prefix."""

    def __init__(self, path, prefix=""):
        self.path = path
        self.prefix = prefix

    def lines(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8") as file:
            return [line.rstrip() for line in file if line.startswith(self.prefix)]


In the year 1869 a canal was opened, and the way from one sea to the other became four thousand
miles shorter. Ships no longer had to sail around the cape. Trade grew, ports that nobody had known
became rich, and others were forgotten. Whoever wants to understand a map should ask what it cost to
carry a ton of coal from one of its corners to another.

def count_words(text):
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


What is water made of? Water is made of hydrogen and oxygen. How many days are in a week? There are
seven days in a week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. Add 12 and
30 and the sum is 42; take 7 away and 35 remain.
'''
