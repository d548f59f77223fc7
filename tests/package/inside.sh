# The life of the package on a copy of this machine: PACKAGE DISC. Runs in mount, network and pid namespaces of its own, as root.
set -euo pipefail
package=$1 disc=$2
fact() { echo "fact: $*"; }

mount --make-rprivate /
base=$(mktemp -d)
mount -t tmpfs none "$base"
mkdir "$base"/{up,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/up,workdir=$base/work" "$base/root"
copy=$base/root
for place in proc sys dev; do mount --rbind "/$place" "$copy/$place"; done
mount -t tmpfs none "$copy/run"
mount -t tmpfs none "$copy/tmp"
cp "$package" "$copy/tmp/repave.deb"
cp "$disc" "$copy/tmp/boot.iso"
ip link set lo up
enter=(chroot "$copy" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8)
demote=(setpriv --reuid repave --regid repave --clear-groups --no-new-privs)
in_copy() { "${enter[@]}" "$@"; }
as_service() { in_copy "${demote[@]}" "$@"; }

in_copy dpkg --install /tmp/repave.deb
in_copy getent passwd repave >/dev/null
in_copy test -x /opt/repave/bin/repave
[ "$(in_copy stat -c '%U %a' /etc/repave /var/lib/repave | paste -sd' ')" = "repave 750 repave 700" ]
fact installed

unit=/lib/systemd/system/repave.service
grep -q '^ConditionPathExists=/etc/repave/repave.toml' "$copy$unit"
in_copy test ! -e /etc/repave/repave.toml
fact not started without settings

as_service repave init --state /var/lib/repave >/dev/null
cp "$copy/tmp/boot.iso" "$copy/var/lib/repave/data/boot.iso"
chmod 644 "$copy/var/lib/repave/data/boot.iso"
mount --bind "$copy/etc/repave" "$copy/etc/repave" # as ProtectSystem=strict has it
mount -o remount,bind,ro "$copy/etc/repave"
"${enter[@]}" "${demote[@]}" $(sed -n 's/^ExecStart=//p' "$copy$unit") 2>"$base/log" &
service=$!
for _ in $(seq 150); do
  in_copy repave health >/dev/null 2>&1 && break
  kill -0 $service || { cat "$base/log"; exit 1; }
  sleep 0.2
done
in_copy repave health
in_copy repave whoami
fact served

as_service touch /etc/repave/x 2>/dev/null && exit 1
[ -z "$(in_copy find /var/lib/repave -not -user repave -not -name boot.iso)" ]
fact settings are read-only for it

kill -TERM $service
wait $service
umount "$copy/etc/repave"
fact stopped

in_copy systemd-analyze verify --man=no "$unit"
fact verified
in_copy systemd-analyze security --offline=true --no-pager "$unit"

in_copy dpkg --remove repave
in_copy test ! -e /opt/repave -a -e /etc/repave/repave.toml -a -e /var/lib/repave/secret/key
fact removed
in_copy dpkg --purge repave
in_copy test ! -e /etc/repave -a ! -e /var/lib/repave
in_copy getent passwd repave >/dev/null && exit 1
fact purged
