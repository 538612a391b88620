#!/usr/bin/env bash
# Ray on plain hosts, with token authentication: `deploy/hosts.sh head`, then `deploy/hosts.sh join HEAD_ADDRESS` on each other host.
# All hosts need the same Python environment with rookery[ray] in it, and the same ~/.ray/auth_token.
set -euo pipefail

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000 \
       RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5 # a lost host is noticed after 5 to 15 s, not 65
# With certificates at hand, encrypt what goes between hosts:
# export RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=... RAY_TLS_SERVER_KEY=... RAY_TLS_CA_CERT=...

case "${1:-}" in
  head)
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
      mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
      (umask 077 && python3 -c "import secrets; print(secrets.token_hex(32), end='')" >"$RAY_AUTH_TOKEN_PATH")
      echo "Made the token $RAY_AUTH_TOKEN_PATH: copy it to the same place on every other host."
    fi
    ray start --head --port=6379 --include-dashboard=false --disable-usage-stats
    ;;
  join) ray start --address="${2:?the head's address}:6379" --disable-usage-stats ;;
  stop) ray stop ;;
  *) sed -n 2,3p "$0" && exit 2 ;;
esac
