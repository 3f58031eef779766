#!/usr/bin/env bash
# What action.yml runs: compares, prints the result into the log and the summary of the job, and annotates the run with what failed.
set -uo pipefail

arguments=("$NORMSWAP_REFERENCE")
if [ -n "${NORMSWAP_CANDIDATE:-}" ]; then arguments+=("$NORMSWAP_CANDIDATE"); fi
if [ "${NORMSWAP_TRUST:-false}" = true ]; then arguments+=(--trust); fi
read -ra packages <<< "${NORMSWAP_TRUST_PACKAGE:-}"
for package in ${packages[@]+"${packages[@]}"}; do arguments+=(--trust-package "$package"); done
output=$(python -m normswap verify "${arguments[@]}" --junit "${NORMSWAP_JUNIT:-normswap-junit.xml}" 2>&1)
code=$?

# Names in a model are somebody else's text: no line of it may be read as a command of the runner.
token=$(python -c 'import secrets; print(secrets.token_hex(16))')
printf '::stop-commands::%s\n%s\n::%s::\n' "$token" "$output" "$token"
printf '```\n%s\n```\n' "$output" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
if [ "$code" -ne 0 ]; then
  failed=$(printf '%s\n' "$output" | sed -n '/^FAILED: \|^not the same function\|^error: /,$p')
  if [ -z "$failed" ]; then failed="it ended with exit code $code; the log has what it printed"; fi
  failed=${failed//'%'/'%25'}
  printf '::error title=normswap verify::%s\n' "${failed//$'\n'/'%0A'}"
fi
exit "$code"
