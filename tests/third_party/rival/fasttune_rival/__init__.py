"""Another answer to the same name."""

from fasttune.task import Column, Task


class Rival(Task):
    columns = (Column("rival_words", "text"),)
