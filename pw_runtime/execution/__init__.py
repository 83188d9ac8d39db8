# SPDX-License-Identifier: Apache-2.0
"""The networks on engines: what is compiled, which engines there are, where weights lie."""
