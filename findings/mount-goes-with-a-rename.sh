#!/bin/bash
#
# Question: does a bind mount stay over a file when a process in another mount namespace renames a new file to that name?
#
# Why it matters: a program that gives another one its own /etc/resolv.conf by a bind mount loses it when a DHCP client or
# NetworkManager replaces the file of the host, as they do when the network changes. A tmpfs that hides the directory of a socket
# goes likewise when a service removes its directory at a restart and makes it again.
#
# Seen with: Linux 6.18. Explained by: vfs_rename() and vfs_rmdir() in fs/namei.c refuse with EBUSY only where the name is a mount
# point in the caller's own mount namespace. Otherwise they call detach_mounts(), which unmounts it in all the others.

. "$(dirname "$0")/lib.bash"

((EUID == 0)) || cannot "mount namespaces need root"
need unshare mount

cd "$work"
mkdir dir
echo "the host's" >file
echo "the program's" >other
touch dir/socket

# The program: it covers both, and looks again when it is told to.
unshare --mount --propagation slave bash -ec '
	mount --bind other file
	mount -t tmpfs none dir
	cat file >before; ls dir >>before
	touch ready
	for ((i = 0; i < 200; i++)); do [[ ! -e go ]] || break; sleep 0.05; done
	cat file >after; ls dir >>after' >log 2>&1 &
children+=($!)
within 10 test -e ready
[[ $(<before) == "the program's" ]] || cannot "the mounts do not cover the file and the directory"

# The host.
echo "the host's new one" >new
mv new file
rm -r dir
mkdir dir
touch dir/socket
touch go
within 10 test -s after
wait "${children[0]}" || cannot "the program failed: $(<log)"
children=()

report version "Linux $(uname -r)"
report expected "the program still sees its own file, and an empty directory"
report seen "$(tr '\n' ',' <after)"
conclude "$(<after)" $'the host\'s new one\nsocket'
