# What Docker 28 makes of a machine (bridge network, one published port), for both families; by whatever iptables there is.
set -eu
for iptables in iptables ip6tables; do
  case $iptables in
    iptables) inside=172.17.0.0/16 container=172.17.0.2/32 ;;
    ip6tables) inside=fd00:17::/64 container=fd00:17::2/128 ;;
  esac
  for chain in DOCKER DOCKER-BRIDGE DOCKER-CT DOCKER-FORWARD DOCKER-ISOLATION-STAGE-1 DOCKER-ISOLATION-STAGE-2 DOCKER-USER; do
    $iptables -N $chain
  done
  $iptables -P FORWARD DROP
  $iptables -A FORWARD -j DOCKER-USER
  $iptables -A FORWARD -j DOCKER-FORWARD
  $iptables -A DOCKER -d $container ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
  $iptables -A DOCKER ! -i docker0 -o docker0 -j DROP
  $iptables -A DOCKER-BRIDGE -o docker0 -j DOCKER
  $iptables -A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
  $iptables -A DOCKER-FORWARD -j DOCKER-CT
  $iptables -A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
  $iptables -A DOCKER-FORWARD -j DOCKER-BRIDGE
  $iptables -A DOCKER-FORWARD -i docker0 -j ACCEPT
  $iptables -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
  $iptables -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
  $iptables -t nat -N DOCKER
  $iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
  $iptables -t nat -A POSTROUTING -s $inside ! -o docker0 -j MASQUERADE
  $iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j RETURN
done
