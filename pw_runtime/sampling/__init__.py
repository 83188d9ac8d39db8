# SPDX-License-Identifier: Apache-2.0
"""From noise to a latent: schedules, solvers, noise."""
