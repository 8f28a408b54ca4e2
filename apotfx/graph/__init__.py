"""From a float network to a graph that says what it computes, and what is known of its layers.

tracing -> functional -> modularize -> facts -> passes; imports the arithmetic and the layers, nothing above.
"""
