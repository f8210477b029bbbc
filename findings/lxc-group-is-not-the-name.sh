#!/bin/bash
#
# Question: which control group has a container of LXC?
#
# Why it matters: a program that looks for the processes of a container without asking LXC takes the name from the group. When
# the group lxc.payload.web is there, because another web runs or has left it behind, the next web gets lxc.payload.web-1. That
# is the group of a container called web-1, too. The title of the monitor, the parent of the first process, has the name alone.
#
# Seen with: lxc 5.0.2. Explained by: cgfsng_payload_create() of cgroups/cgfsng.c tries again with a number behind the name.

. "$(dirname "$0")/lib.bash"

((EUID == 0)) || cannot "containers need root"
need busybox unshare
debs lxc=1:5.0.2-1+deb12u4 liblxc1=1:5.0.2-1+deb12u4 liblxc-common=1:5.0.2-1+deb12u4
PATH=$work/root/usr/bin:$PATH
mkdir -p "$work/mount"
for path in one two; do
	mkdir -p "$work/$path/web" "$work/root-$path"/{bin,dev,proc,sys}
	cp "$(command -v busybox)" "$work/root-$path/bin/busybox"
	cat >"$work/$path/web/config" <<-END
		lxc.uts.name = web
		lxc.rootfs.path = dir:$work/root-$path
		lxc.rootfs.mount = $work/mount
		lxc.net.0.type = empty
		lxc.apparmor.profile = unconfined
		lxc.cgroup.dir = finding-$$
		lxc.init.cmd = /bin/busybox sleep 60
	END
done
chmod 755 "$work"

# In process and mount namespaces of its own, with the control groups mounted there, so that all ends with the shell.
cat >"$work/inside" <<'END'
set -e
mount -t tmpfs none /run
if grep -q '^[1-9]' /proc/self/cgroup; then
	mount -t tmpfs none /sys/fs/cgroup
	while IFS=: read -r _ controllers _; do
		[ -n "$controllers" ] || continue
		dir=/sys/fs/cgroup/${controllers#name=}
		mkdir "$dir"
		mount -t cgroup -o "$controllers" none "$dir"
	done </proc/self/cgroup
fi
for path in one two; do
	lxc-start -P "$1/$path" -n web
	pid=$(lxc-info -P "$1/$path" -n web -p -H)
	group=$(grep -o 'lxc\.payload\.[^/]*' "/proc/$pid/cgroup" | sort -u)
	echo "$path/web $group $(tr -d '\0' <"/proc/$(awk '/^PPid/ { print $2 }' "/proc/$pid/status")/cmdline" | sed 's/.* //')"
done
for path in one two; do lxc-stop -P "$1/$path" -n web -k; done
for try in {1..50}; do
	find /sys/fs/cgroup -depth -type d -path "*/$2*" -exec rmdir {} + 2>/dev/null || true
	[ -n "$(find /sys/fs/cgroup -type d -name "$2" -print -quit)" ] || break
	sleep 0.1
done
END
unshare --mount --net --pid --fork --mount-proc --propagation private bash "$work/inside" "$work" "finding-$$" >"$work/seen" 2>"$work/errors" ||
	cannot "the containers do not run: $(tail -n 1 "$work/errors")"

report version "$(lxc-start --version)"
report expected "Both containers that are called web have a control group of that name, below whatever else."
while read -r where group title; do report seen "$where is in $group; the title of its monitor says $title"; done <"$work/seen"
conclude "$(cut -d ' ' -f 2- "$work/seen" | paste -sd ';')" "lxc.payload.web web;lxc.payload.web-1 web"
