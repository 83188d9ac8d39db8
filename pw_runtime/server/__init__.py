# SPDX-License-Identifier: Apache-2.0
"""`pw serve`: a queue of clips behind an OpenAI-style video API, and the page that shows it.

Two kinds of process. The one that answers requests holds the queue and imports no torch; each
device has a worker, which makes one job at a time and dies with the first.
"""
